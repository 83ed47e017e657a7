// Vec on Arm NEON (AArch64).
#pragma once

#include <arm_neon.h>

namespace vlmops {
namespace VLMOPS_ISA {

constexpr int kLanes = 4;
struct Vec {
  float32x4_t v;
};
struct Mask {
  uint32x4_t m;
};

VLMOPS_INLINE Vec zero() { return {vdupq_n_f32(0.f)}; }
VLMOPS_INLINE Vec set1(float s) { return {vdupq_n_f32(s)}; }
VLMOPS_INLINE Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
VLMOPS_INLINE Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
VLMOPS_INLINE Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
VLMOPS_INLINE Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
VLMOPS_INLINE Vec operator-(Vec a) { return {vnegq_f32(a.v)}; }
VLMOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
VLMOPS_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
VLMOPS_INLINE Vec max(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
VLMOPS_INLINE Vec min(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
VLMOPS_INLINE Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
VLMOPS_INLINE Vec sqrt(Vec a) { return {vsqrtq_f32(a.v)}; }
VLMOPS_INLINE Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
VLMOPS_INLINE Vec copysign(Vec mag, Vec sgn) { return {vbslq_f32(vdupq_n_u32(0x80000000u), sgn.v, mag.v)}; }
VLMOPS_INLINE Mask lt(Vec a, Vec b) { return {vcltq_f32(a.v, b.v)}; }
VLMOPS_INLINE Mask le(Vec a, Vec b) { return {vcleq_f32(a.v, b.v)}; }
VLMOPS_INLINE Mask eq(Vec a, Vec b) { return {vceqq_f32(a.v, b.v)}; }
VLMOPS_INLINE Vec select(Mask m, Vec a, Vec b) { return {vbslq_f32(m.m, a.v, b.v)}; }
VLMOPS_INLINE Mask first_n(int n) {
  const vlmops_i32 index[4] = {0, 1, 2, 3};
  return {vcltq_s32(vld1q_s32(index), vdupq_n_s32(n))};
}
VLMOPS_INLINE Mask and_(Mask a, Mask b) { return {vandq_u32(a.m, b.m)}; }
VLMOPS_INLINE Mask or_(Mask a, Mask b) { return {vorrq_u32(a.m, b.m)}; }
VLMOPS_INLINE Mask not_(Mask a) { return {vmvnq_u32(a.m)}; }
VLMOPS_INLINE bool any(Mask m) { return vmaxvq_u32(m.m) != 0; }
VLMOPS_INLINE bool all(Mask m) { return vminvq_u32(m.m) != 0; }
VLMOPS_INLINE float reduce_add(Vec a) { return vaddvq_f32(a.v); }
VLMOPS_INLINE float reduce_max(Vec a) { return vmaxvq_f32(a.v); }

VLMOPS_INLINE Vec scale2(Vec p, Vec n) {  // in two halves, so that results below the normal range come out right
  const int32x4_t i = vcvtnq_s32_f32(n.v), a = vshrq_n_s32(i, 1), b = vsubq_s32(i, a), bias = vdupq_n_s32(127);
  const float32x4_t fa = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(a, bias), 23));
  const float32x4_t fb = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(b, bias), 23));
  return {vmulq_f32(vmulq_f32(p.v, fa), fb)};
}
VLMOPS_INLINE Vec add_exponent(Vec p, Vec u) {
  return {vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(p.v), vshlq_n_u32(vreinterpretq_u32_f32(u.v), 23)))};
}
VLMOPS_INLINE Vec swap_pairs(Vec a) { return {vrev64q_f32(a.v)}; }
VLMOPS_INLINE Vec split2(Vec x, Vec& e) {
  const int32x4_t half = vdupq_n_s32(0x3f3504f3);  // sqrt(1/2)
  const int32x4_t b = vsubq_s32(vreinterpretq_s32_f32(x.v), half);
  e = {vcvtq_f32_s32(vshrq_n_s32(b, 23))};
  return {vreinterpretq_f32_s32(vaddq_s32(vandq_s32(b, vdupq_n_s32(0x7fffff)), half))};
}

// float32
VLMOPS_INLINE Vec load(const float* p) { return {vld1q_f32(p)}; }
VLMOPS_INLINE Vec load_n(const float* p, int n) {
  float t[4] = {0.f, 0.f, 0.f, 0.f};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(static_cast<const float*>(t));
}
VLMOPS_INLINE void store(float* p, Vec v) { vst1q_f32(p, v.v); }
VLMOPS_INLINE void store_n(float* p, Vec v, int n) {
  float t[4];
  store(t, v);
  for (int i = 0; i < n; ++i) p[i] = t[i];
}

VLMOPS_INLINE uint16x4_t load16_n_(const void* p, int n) {
  vlmops_u16 t[4] = {0, 0, 0, 0};
  __builtin_memcpy(t, p, 2 * static_cast<unsigned>(n));
  return vld1_u16(t);
}
VLMOPS_INLINE void store16_n_(void* p, uint16x4_t h, int n) {
  vlmops_u16 t[4];
  vst1_u16(t, h);
  __builtin_memcpy(p, t, 2 * static_cast<unsigned>(n));
}

// bfloat16
VLMOPS_INLINE uint16x4_t to_bf16_(float32x4_t v) {
  const uint32x4_t b = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(b, 16), vdupq_n_u32(1));
  const uint32x4_t r = vaddq_u32(b, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), r, vorrq_u32(b, vdupq_n_u32(0x400000))), 16);
}
VLMOPS_INLINE float32x4_t from_bf16_(uint16x4_t h) { return vreinterpretq_f32_u32(vshll_n_u16(h, 16)); }
VLMOPS_INLINE Vec load(const BF16* p) { return {from_bf16_(load16_n_(p, 4))}; }
VLMOPS_INLINE Vec load_n(const BF16* p, int n) { return {from_bf16_(load16_n_(p, n))}; }
VLMOPS_INLINE void store(BF16* p, Vec v) { store16_n_(p, to_bf16_(v.v), 4); }
VLMOPS_INLINE void store_n(BF16* p, Vec v, int n) { store16_n_(p, to_bf16_(v.v), n); }
VLMOPS_INLINE Vec round_bf16(Vec v) { return {from_bf16_(to_bf16_(v.v))}; }

// float16
VLMOPS_INLINE uint16x4_t to_fp16_(float32x4_t v) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
VLMOPS_INLINE float32x4_t from_fp16_(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
VLMOPS_INLINE Vec load(const FP16* p) { return {from_fp16_(load16_n_(p, 4))}; }
VLMOPS_INLINE Vec load_n(const FP16* p, int n) { return {from_fp16_(load16_n_(p, n))}; }
VLMOPS_INLINE void store(FP16* p, Vec v) { store16_n_(p, to_fp16_(v.v), 4); }
VLMOPS_INLINE void store_n(FP16* p, Vec v, int n) { store16_n_(p, to_fp16_(v.v), n); }
VLMOPS_INLINE Vec round_fp16(Vec v) { return {from_fp16_(to_fp16_(v.v))}; }

// uint8
VLMOPS_INLINE Vec load_n(const vlmops_u8* p, int n) {
  float t[4] = {0.f, 0.f, 0.f, 0.f};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(static_cast<const float*>(t));
}
VLMOPS_INLINE Vec load(const vlmops_u8* p) { return load_n(p, 4); }

VLMOPS_INLINE void transpose(Vec (&r)[4]) {
  const float32x4x2_t a = vtrnq_f32(r[0].v, r[1].v), b = vtrnq_f32(r[2].v, r[3].v);
  r[0].v = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
  r[1].v = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
  r[2].v = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
  r[3].v = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
