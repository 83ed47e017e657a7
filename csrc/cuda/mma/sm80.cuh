// mma.sync m16n8k16: D[16, 8] += A[16, 16] B[16, 8], 16-bit inputs, float accumulation. One warp.
//
// Lane l = 4 g + t holds (a pair is two neighbours along k for A and B, along n for C; the first in the low half):
//   a[0] A(g, 2t)   a[1] A(g + 8, 2t)   a[2] A(g, 2t + 8)   a[3] A(g + 8, 2t + 8)
//   b0 B(2t, g)   b1 B(2t + 8, g)
//   c[0], c[1] C(g, 2t), C(g, 2t + 1)   c[2], c[3] C(g + 8, 2t), C(g + 8, 2t + 1)
#pragma once

#include "../ptx/platform.cuh"
#include "../ptx/types.cuh"

namespace vlmops {

VLMOPS_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
#ifdef VLMOPS_SIMT
  vlmops_simt_mma_m16n8k16(c, a, b0, b1, true);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
VLMOPS_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, fp16) {
#ifdef VLMOPS_SIMT
  vlmops_simt_mma_m16n8k16(c, a, b0, b1, false);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// T: bf16 or fp16.
template <class T>
VLMOPS_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_m16n8k16(c, a, b0, b1, T{0});
}

}  // namespace vlmops
