// Vec on AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace vlmops {
namespace VLMOPS_ISA {

constexpr int kLanes = 8;
struct Vec {
  __m256 v;
};
struct Mask {
  __m256 m;
};

VLMOPS_INLINE __m256i lanes_(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
VLMOPS_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
VLMOPS_INLINE Vec set1(float s) { return {_mm256_set1_ps(s)}; }
VLMOPS_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec operator-(Vec a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.f))}; }
VLMOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
VLMOPS_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
VLMOPS_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
VLMOPS_INLINE Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
VLMOPS_INLINE Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
VLMOPS_INLINE Vec copysign(Vec mag, Vec sgn) {
  const __m256 bit = _mm256_set1_ps(-0.f);
  return {_mm256_or_ps(_mm256_andnot_ps(bit, mag.v), _mm256_and_ps(bit, sgn.v))};
}
VLMOPS_INLINE Mask lt(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
VLMOPS_INLINE Mask le(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
VLMOPS_INLINE Mask eq(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
VLMOPS_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }
VLMOPS_INLINE Mask first_n(int n) { return {_mm256_castsi256_ps(lanes_(n))}; }
VLMOPS_INLINE Mask and_(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
VLMOPS_INLINE Mask or_(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
VLMOPS_INLINE Mask not_(Mask a) { return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
VLMOPS_INLINE bool any(Mask m) { return _mm256_movemask_ps(m.m) != 0; }
VLMOPS_INLINE bool all(Mask m) { return _mm256_movemask_ps(m.m) == 0xff; }
VLMOPS_INLINE float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
VLMOPS_INLINE float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}

VLMOPS_INLINE Vec scale2(Vec p, Vec n) {  // in two halves, so that results below the normal range come out right
  const __m256i i = _mm256_cvtps_epi32(n.v);
  const __m256i a = _mm256_srai_epi32(i, 1), b = _mm256_sub_epi32(i, a), bias = _mm256_set1_epi32(127);
  const __m256 fa = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(a, bias), 23));
  const __m256 fb = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(b, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(p.v, fa), fb)};
}
VLMOPS_INLINE Vec add_exponent(Vec p, Vec u) {
  return {
      _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), _mm256_slli_epi32(_mm256_castps_si256(u.v), 23)))};
}
VLMOPS_INLINE Vec swap_pairs(Vec a) { return {_mm256_permute_ps(a.v, 0xb1)}; }
VLMOPS_INLINE Vec split2(Vec x, Vec& e) {
  const __m256i half = _mm256_set1_epi32(0x3f3504f3);  // sqrt(1/2)
  const __m256i b = _mm256_sub_epi32(_mm256_castps_si256(x.v), half);
  e = {_mm256_cvtepi32_ps(_mm256_srai_epi32(b, 23))};
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_and_si256(b, _mm256_set1_epi32(0x7fffff)), half))};
}

// float32
VLMOPS_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
VLMOPS_INLINE Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, lanes_(n))}; }
VLMOPS_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v.v); }
VLMOPS_INLINE void store_n(float* p, Vec v, int n) { _mm256_maskstore_ps(p, lanes_(n), v.v); }

// 16-bit tails go through a buffer: there is no masked 16-bit load
VLMOPS_INLINE __m128i load16_n_(const void* p, int n) {
  vlmops_u16 t[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  const vlmops_u16* s = static_cast<const vlmops_u16*>(p);
  for (int i = 0; i < n; ++i) t[i] = s[i];
  return _mm_loadu_si128((const __m128i*)t);
}
VLMOPS_INLINE void store16_n_(void* p, __m128i h, int n) {
  vlmops_u16 t[8];
  _mm_storeu_si128((__m128i*)t, h);
  vlmops_u16* d = static_cast<vlmops_u16*>(p);
  for (int i = 0; i < n; ++i) d[i] = t[i];
}

// bfloat16
VLMOPS_INLINE __m256 from_bf16_(__m128i h) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
VLMOPS_INLINE __m128i to_bf16_(__m256 v) {
  const __m256i b = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
  const __m256i q = _mm256_srli_epi32(_mm256_blendv_epi8(r, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
}
VLMOPS_INLINE Vec load(const BF16* p) { return {from_bf16_(_mm_loadu_si128((const __m128i*)p))}; }
VLMOPS_INLINE Vec load_n(const BF16* p, int n) { return {from_bf16_(load16_n_(p, n))}; }
VLMOPS_INLINE void store(BF16* p, Vec v) { _mm_storeu_si128((__m128i*)p, to_bf16_(v.v)); }
VLMOPS_INLINE void store_n(BF16* p, Vec v, int n) { store16_n_(p, to_bf16_(v.v), n); }
VLMOPS_INLINE Vec round_bf16(Vec v) { return {from_bf16_(to_bf16_(v.v))}; }

// float16
VLMOPS_INLINE __m128i to_fp16_(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VLMOPS_INLINE Vec load(const FP16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
VLMOPS_INLINE Vec load_n(const FP16* p, int n) { return {_mm256_cvtph_ps(load16_n_(p, n))}; }
VLMOPS_INLINE void store(FP16* p, Vec v) { _mm_storeu_si128((__m128i*)p, to_fp16_(v.v)); }
VLMOPS_INLINE void store_n(FP16* p, Vec v, int n) { store16_n_(p, to_fp16_(v.v), n); }
VLMOPS_INLINE Vec round_fp16(Vec v) { return {_mm256_cvtph_ps(to_fp16_(v.v))}; }

// uint8
VLMOPS_INLINE Vec load(const vlmops_u8* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
VLMOPS_INLINE Vec load_n(const vlmops_u8* p, int n) {
  vlmops_u8 t[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return load(static_cast<const vlmops_u8*>(t));
}

VLMOPS_INLINE void transpose(Vec (&r)[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
