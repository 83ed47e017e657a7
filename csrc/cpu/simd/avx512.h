// Vec on AVX-512 (F, BW, VL, DQ), with the bf16 instructions where the set has them.
#pragma once

#include <immintrin.h>

namespace vlmops {
namespace VLMOPS_ISA {

constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
struct Mask {
  __mmask16 m;
};

VLMOPS_INLINE __mmask16 lanes_(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
VLMOPS_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
VLMOPS_INLINE Vec set1(float s) { return {_mm512_set1_ps(s)}; }
VLMOPS_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec operator-(Vec a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.f))}; }
VLMOPS_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
VLMOPS_INLINE Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
VLMOPS_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
VLMOPS_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
VLMOPS_INLINE Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
VLMOPS_INLINE Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
VLMOPS_INLINE Vec copysign(Vec mag, Vec sgn) {
  const __m512 bit = _mm512_set1_ps(-0.f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, mag.v), _mm512_and_ps(bit, sgn.v))};
}
VLMOPS_INLINE Mask lt(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
VLMOPS_INLINE Mask le(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
VLMOPS_INLINE Mask eq(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
VLMOPS_INLINE Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }
VLMOPS_INLINE Mask first_n(int n) { return {lanes_(n)}; }
VLMOPS_INLINE Mask and_(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
VLMOPS_INLINE Mask or_(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
VLMOPS_INLINE Mask not_(Mask a) { return {static_cast<__mmask16>(~a.m)}; }
VLMOPS_INLINE bool any(Mask m) { return m.m != 0; }
VLMOPS_INLINE bool all(Mask m) { return m.m == 0xffff; }
VLMOPS_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
VLMOPS_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

VLMOPS_INLINE Vec scale2(Vec p, Vec n) { return {_mm512_scalef_ps(p.v, n.v)}; }
VLMOPS_INLINE Vec add_exponent(Vec p, Vec u) {
  return {
      _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), _mm512_slli_epi32(_mm512_castps_si512(u.v), 23)))};
}
VLMOPS_INLINE Vec swap_pairs(Vec a) { return {_mm512_permute_ps(a.v, 0xb1)}; }
VLMOPS_INLINE Vec split2(Vec x, Vec& e) {
  const __m512i half = _mm512_set1_epi32(0x3f3504f3);  // sqrt(1/2)
  const __m512i b = _mm512_sub_epi32(_mm512_castps_si512(x.v), half);
  e = {_mm512_cvtepi32_ps(_mm512_srai_epi32(b, 23))};
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_and_si512(b, _mm512_set1_epi32(0x7fffff)), half))};
}

// float32
VLMOPS_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
VLMOPS_INLINE Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_(n), p)}; }
VLMOPS_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v.v); }
VLMOPS_INLINE void store_n(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, lanes_(n), v.v); }

// bfloat16
VLMOPS_INLINE __m512 from_bf16_(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
VLMOPS_INLINE __m256i to_bf16_(__m512 v) {
#if VLMOPS_ISA_ID == VLMOPS_ISA_ID_avx512_bf16
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  const __m512i b = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i q = _mm512_mask_or_epi32(r, nan, b, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(q, 16));
#endif
}
VLMOPS_INLINE Vec load(const BF16* p) { return {from_bf16_(_mm256_loadu_si256((const __m256i*)p))}; }
VLMOPS_INLINE Vec load_n(const BF16* p, int n) { return {from_bf16_(_mm256_maskz_loadu_epi16(lanes_(n), p))}; }
VLMOPS_INLINE void store(BF16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, to_bf16_(v.v)); }
VLMOPS_INLINE void store_n(BF16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, lanes_(n), to_bf16_(v.v)); }
VLMOPS_INLINE Vec round_bf16(Vec v) { return {from_bf16_(to_bf16_(v.v))}; }

// float16
VLMOPS_INLINE __m256i to_fp16_(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
VLMOPS_INLINE Vec load(const FP16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
VLMOPS_INLINE Vec load_n(const FP16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes_(n), p))}; }
VLMOPS_INLINE void store(FP16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, to_fp16_(v.v)); }
VLMOPS_INLINE void store_n(FP16* p, Vec v, int n) { _mm256_mask_storeu_epi16(p, lanes_(n), to_fp16_(v.v)); }
VLMOPS_INLINE Vec round_fp16(Vec v) { return {_mm512_cvtph_ps(to_fp16_(v.v))}; }

// uint8
VLMOPS_INLINE Vec load(const vlmops_u8* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
VLMOPS_INLINE Vec load_n(const vlmops_u8* p, int n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes_(n), p)))};
}

VLMOPS_INLINE void transpose(Vec (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {  // pairs of rows, then fours: 4 x 4 blocks inside each 128-bit lane
    const __m512i a = _mm512_castps_si512(r[i].v), b = _mm512_castps_si512(r[i + 1].v);
    t[i] = _mm512_unpacklo_epi32(a, b);
    t[i + 1] = _mm512_unpackhi_epi32(a, b);
  }
  __m512i u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // then the 128-bit lanes themselves
    const __m512i ac0 = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88), ac1 = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd);
    const __m512i bd0 = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88),
                  bd1 = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
    r[i].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(ac0, bd0, 0x88));
    r[i + 8].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(ac0, bd0, 0xdd));
    r[i + 4].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(ac1, bd1, 0x88));
    r[i + 12].v = _mm512_castsi512_ps(_mm512_shuffle_i32x4(ac1, bd1, 0xdd));
  }
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
