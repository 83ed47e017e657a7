// Vec on the compiler's own 4-float vectors: whatever the baseline has (SSE2, or nothing at all).
#pragma once

namespace vlmops {
namespace VLMOPS_ISA {

constexpr int kLanes = 4;
typedef float f4_ __attribute__((vector_size(16)));
typedef vlmops_i32 i4_ __attribute__((vector_size(16)));
typedef vlmops_u32 u4_ __attribute__((vector_size(16)));
struct Vec {
  f4_ v;
};
struct Mask {
  i4_ m;
};

VLMOPS_INLINE Vec set1(float s) { return {f4_{s, s, s, s}}; }
VLMOPS_INLINE Vec zero() { return set1(0.f); }
VLMOPS_INLINE u4_ splat_(vlmops_u32 s) { return u4_{s, s, s, s}; }
VLMOPS_INLINE f4_ pick_(i4_ m, f4_ a, f4_ b) { return (f4_)(((i4_)a & m) | ((i4_)b & ~m)); }
VLMOPS_INLINE u4_ pick_(i4_ m, u4_ a, u4_ b) { return (a & (u4_)m) | (b & ~(u4_)m); }

VLMOPS_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
VLMOPS_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
VLMOPS_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
VLMOPS_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
VLMOPS_INLINE Vec operator-(Vec a) { return {-a.v}; }
VLMOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
VLMOPS_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {c.v - a.v * b.v}; }
VLMOPS_INLINE Vec max(Vec a, Vec b) { return {pick_(a.v > b.v, a.v, b.v)}; }
VLMOPS_INLINE Vec min(Vec a, Vec b) { return {pick_(a.v < b.v, a.v, b.v)}; }
VLMOPS_INLINE Vec abs(Vec a) { return {(f4_)((u4_)a.v & splat_(0x7fffffffu))}; }
VLMOPS_INLINE Vec sqrt(Vec a) {
  f4_ r;
  for (int i = 0; i < 4; ++i) r[i] = __builtin_sqrtf(a.v[i]);
  return {r};
}
VLMOPS_INLINE Vec round(Vec a) {  // the sum has no fraction bits left
  const f4_ magic = set1(12582912.f).v;
  return {(a.v + magic) - magic};
}
VLMOPS_INLINE Vec copysign(Vec mag, Vec sgn) {
  return {(f4_)(((u4_)mag.v & splat_(0x7fffffffu)) | ((u4_)sgn.v & splat_(0x80000000u)))};
}
VLMOPS_INLINE Mask lt(Vec a, Vec b) { return {a.v < b.v}; }
VLMOPS_INLINE Mask le(Vec a, Vec b) { return {a.v <= b.v}; }
VLMOPS_INLINE Mask eq(Vec a, Vec b) { return {a.v == b.v}; }
VLMOPS_INLINE Vec select(Mask m, Vec a, Vec b) { return {pick_(m.m, a.v, b.v)}; }
VLMOPS_INLINE Mask first_n(int n) { return {i4_{0, 1, 2, 3} < i4_{n, n, n, n}}; }
VLMOPS_INLINE Mask and_(Mask a, Mask b) { return {a.m & b.m}; }
VLMOPS_INLINE Mask or_(Mask a, Mask b) { return {a.m | b.m}; }
VLMOPS_INLINE Mask not_(Mask a) { return {~a.m}; }
VLMOPS_INLINE bool any(Mask m) { return (m.m[0] | m.m[1] | m.m[2] | m.m[3]) != 0; }
VLMOPS_INLINE bool all(Mask m) { return (m.m[0] & m.m[1] & m.m[2] & m.m[3]) != 0; }
VLMOPS_INLINE float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
VLMOPS_INLINE float reduce_max(Vec a) {
  const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1], y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
  return x > y ? x : y;
}

VLMOPS_INLINE Vec scale2(Vec p, Vec n) {  // in two halves, so that results below the normal range come out right
  const f4_ m =
      n.v + set1(12582912.f).v;  // the whole number in the low mantissa bits, no conversion that NaN could break
  const i4_ i = ((i4_)m << 9) >> 9;
  const i4_ a = i >> 1, b = i - a;
  const f4_ fa = (f4_)((u4_)(a + 127) << 23), fb = (f4_)((u4_)(b + 127) << 23);
  return {(p.v * fa) * fb};
}
VLMOPS_INLINE Vec add_exponent(Vec p, Vec u) { return {(f4_)((u4_)p.v + ((u4_)u.v << 23))}; }
VLMOPS_INLINE Vec swap_pairs(Vec a) { return {f4_{a.v[1], a.v[0], a.v[3], a.v[2]}}; }
VLMOPS_INLINE Vec split2(Vec x, Vec& e) {
  const i4_ b = (i4_)x.v - (i4_)splat_(0x3f3504f3u);  // sqrt(1/2)
  const i4_ s = b >> 23;
  e = {f4_{(float)s[0], (float)s[1], (float)s[2], (float)s[3]}};
  return {(f4_)((b & (i4_)splat_(0x7fffffu)) + (i4_)splat_(0x3f3504f3u))};
}

// float32
VLMOPS_INLINE Vec load(const float* p) {
  Vec r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
VLMOPS_INLINE Vec load_n(const float* p, int n) {
  float t[4] = {0.f, 0.f, 0.f, 0.f};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(static_cast<const float*>(t));
}
VLMOPS_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
VLMOPS_INLINE void store_n(float* p, Vec v, int n) {
  float t[4];
  store(t, v);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}

VLMOPS_INLINE u4_ load16_n_(const void* p, int n) {
  vlmops_u16 t[4] = {0, 0, 0, 0};
  __builtin_memcpy(t, p, 2 * static_cast<unsigned>(n));
  return u4_{t[0], t[1], t[2], t[3]};
}
VLMOPS_INLINE void store16_n_(void* p, u4_ h, int n) {
  const vlmops_u16 t[4] = {(vlmops_u16)h[0], (vlmops_u16)h[1], (vlmops_u16)h[2], (vlmops_u16)h[3]};
  __builtin_memcpy(p, t, 2 * static_cast<unsigned>(n));
}

// bfloat16
VLMOPS_INLINE u4_ to_bf16_(f4_ v) {
  const u4_ b = (u4_)v;
  const u4_ r = b + splat_(0x7fffu) + ((b >> 16) & splat_(1u));
  return pick_((i4_)(v != v), b | splat_(0x400000u), r) >> 16;
}
VLMOPS_INLINE Vec load_n(const BF16* p, int n) { return {(f4_)(load16_n_(p, n) << 16)}; }
VLMOPS_INLINE Vec load(const BF16* p) { return load_n(p, 4); }
VLMOPS_INLINE void store_n(BF16* p, Vec v, int n) { store16_n_(p, to_bf16_(v.v), n); }
VLMOPS_INLINE void store(BF16* p, Vec v) { store_n(p, v, 4); }
VLMOPS_INLINE Vec round_bf16(Vec v) { return {(f4_)(to_bf16_(v.v) << 16)}; }

// float16: exponents are moved by a multiplication, which treats subnormals right
VLMOPS_INLINE f4_ from_fp16_(u4_ h) {
  const u4_ mag = (h & splat_(0x7fffu)) << 13;
  const f4_ f = (f4_)mag * set1(0x1p112f).v;
  const u4_ special = (u4_)f | splat_(0x7f800000u);
  const u4_ r = pick_((i4_)(mag >= splat_(0x7c00u << 13)), special, (u4_)f);
  return (f4_)(r | ((h & splat_(0x8000u)) << 16));
}
VLMOPS_INLINE u4_ to_fp16_(f4_ v) {
  const u4_ b = (u4_)v, sign = (b >> 16) & splat_(0x8000u), mag = b & splat_(0x7fffffffu);
  const u4_ normal = (mag + splat_(0xc8000fffu) + ((mag >> 13) & splat_(1u))) >> 13;  // rebias by 112, round to even
  const u4_ tiny = (u4_)((f4_)mag + set1(0.5f).v) - splat_(0x3f000000u);              // the addition rounds at 2^-24
  u4_ r = pick_((i4_)(mag < splat_(0x38800000u)), tiny, normal);
  r = pick_((i4_)(mag >= splat_(0x477ff000u)), splat_(0x7c00u), r);
  r = pick_((i4_)(mag > splat_(0x7f800000u)), splat_(0x7e00u), r);
  return r | sign;
}
VLMOPS_INLINE Vec load_n(const FP16* p, int n) { return {from_fp16_(load16_n_(p, n))}; }
VLMOPS_INLINE Vec load(const FP16* p) { return load_n(p, 4); }
VLMOPS_INLINE void store_n(FP16* p, Vec v, int n) { store16_n_(p, to_fp16_(v.v), n); }
VLMOPS_INLINE void store(FP16* p, Vec v) { store_n(p, v, 4); }
VLMOPS_INLINE Vec round_fp16(Vec v) { return {from_fp16_(to_fp16_(v.v))}; }

// uint8
VLMOPS_INLINE Vec load_n(const vlmops_u8* p, int n) {
  float t[4] = {0.f, 0.f, 0.f, 0.f};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(static_cast<const float*>(t));
}
VLMOPS_INLINE Vec load(const vlmops_u8* p) { return load_n(p, 4); }

VLMOPS_INLINE void transpose(Vec (&r)[4]) {
  const f4_ a = r[0].v, b = r[1].v, c = r[2].v, d = r[3].v;
  r[0].v = f4_{a[0], b[0], c[0], d[0]};
  r[1].v = f4_{a[1], b[1], c[1], d[1]};
  r[2].v = f4_{a[2], b[2], c[2], d[2]};
  r[3].v = f4_{a[3], b[3], c[3], d[3]};
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
