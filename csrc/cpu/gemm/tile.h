// The register tile every matrix kernel here is built on: MR x NR vectors of float accumulators.
//
// Operands are made of 4-byte cells: one float, or (avx512_bf16) two bf16 that are neighbours along the summed
// dimension. So float and bf16 kernels have the same shape; only madd differs.
#pragma once

#include "../simd.h"

namespace vlmops {
namespace VLMOPS_ISA {

// Any 4 bytes of an operand, at any 2-byte alignment.
typedef float Cell __attribute__((may_alias, aligned(2)));

struct F32Cells {
  static constexpr int kDepth = 1;  // summed elements in a cell
  typedef float Element;
  VLMOPS_INLINE void madd(Vec& c, Vec a, Vec b) { c = fma(a, b, c); }
};

#if VLMOPS_ISA_ID == VLMOPS_ISA_ID_avx512_bf16
#define VLMOPS_BF16_CELLS 1
struct BF16Cells {
  static constexpr int kDepth = 2;
  typedef BF16 Element;
  VLMOPS_INLINE void madd(Vec& c, Vec a, Vec b) { c.v = _mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v); }

  // Cells of two rows of non-negative floats, rounded to nearest (ties up). Integer operations only: the conversion
  // instructions would take the pipes that multiply.
  VLMOPS_INLINE Vec join(Vec even, Vec odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i a = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even.v), half), 16);
    const __m512i b = _mm512_add_epi32(_mm512_castps_si512(odd.v), half);
    return {_mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaau, a, b))};
  }

  // Cells of two rows of any floats, rounded to nearest even, NaN kept.
  VLMOPS_INLINE Vec join_any(Vec even, Vec odd) {
    const __m512i a = (__m512i)_mm512_cvtne2ps_pbh(odd.v, even.v);  // 16 of even, then 16 of odd
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, a))};
  }

  // Cells of the first n elements of two rows of bf16.
  VLMOPS_INLINE Vec zip(const BF16* even, const BF16* odd, int n) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_(n), even));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes_(n), odd));
    return {_mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)))};
  }
};
#else
#define VLMOPS_BF16_CELLS 0
#endif

// Widest tile (vectors across) and its height for each width: at least 12 accumulators, to hide the latency of two
// multiply-add pipes, and as many as the register file takes beside one row of B.
#if VLMOPS_ISA_ID == VLMOPS_ISA_ID_generic || VLMOPS_ISA_ID == VLMOPS_ISA_ID_avx2
constexpr int kMaxNR = 2;  // 16 registers
constexpr int tile_rows(int nr) { return nr == 2 ? 6 : 12; }
#else
constexpr int kMaxNR = 4;  // 32 registers
constexpr int tile_rows(int nr) { return nr == 4 ? 6 : nr == 3 ? 8 : 12; }
#endif

enum class Walk { kRows, kColumns };

// c[i][j] += sum over k < depth of A(i, k) * B(k, j); B(k, j) at b + (k * NR + j) * kLanes.
// kRows: A(i, k) at a + i * stride + k.  kColumns: at a + k * stride + i.
template <class Cells, Walk kWalk, int MR, int NR>
VLMOPS_INLINE void multiply(Vec (&c)[MR][NR], const Cell* a, vlmops_i64 stride, const Cell* b, int depth) {
#pragma GCC unroll 4
  for (int k = 0; k < depth; ++k) {
    Vec row[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) row[j] = load((const float*)(b + j * kLanes));
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      const Vec x = set1(kWalk == Walk::kRows ? a[i * stride] : a[i]);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) Cells::madd(c[i][j], x, row[j]);
    }
    a += kWalk == Walk::kRows ? 1 : stride;
    b += NR * kLanes;
  }
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
