// C [M, N] = A [M, K] B [N, K]^T with 64 x 64 tiles, a two-stage cp.async pipeline and an optional swizzle: a kernel of
// the kind the project has, for the machine's counters. K is a multiple of 32, A and B dense.
#include "mma/sm80.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"

namespace vlmops {

using T = VLMOPS_T;

constexpr int kTile = 64, kStep = 32, kChunks = kStep / 8;

// Element offset of 8 elements in a tile of rows of 32. A wavefront reads 8 rows of 64 bytes: two rows fill the banks.
VLMOPS_DEVICE int at(int row, int chunk) {
#if VLMOPS_SWIZZLE
  chunk ^= row / 2 % kChunks;
#endif
  return row * kStep + chunk * 8;
}

VLMOPS_KERNEL(gemm)(const T* a, const T* b, float* c, int m, int n, int k) {
  VLMOPS_DYNAMIC_SHARED(T, shared);  // [2 stages, A and B, 64, 32]
  const int t = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
  const int m0 = static_cast<int>(blockIdx.x) * kTile, n0 = static_cast<int>(blockIdx.y) * kTile;
  const auto load = [&](int stage, int k0) {
    T* const to = shared + stage * 2 * kTile * kStep;
    for (int i = t; i < kTile * kChunks; i += VLMOPS_THREADS) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool in_a = m0 + row < m, in_b = n0 + row < n;
      cp_async16(to + at(row, chunk), in_a ? a + (m0 + row) * k + k0 + chunk * 8 : a, in_a);
      cp_async16(to + kTile * kStep + at(row, chunk), in_b ? b + (n0 + row) * k + k0 + chunk * 8 : b, in_b);
    }
    cp_async_commit();
  };
  float sum[8][4] = {};
  load(0, 0);
  for (int k0 = 0, stage = 0; k0 < k; k0 += kStep, stage ^= 1) {
    if (k0 + kStep < k) {
      load(stage ^ 1, k0 + kStep);
      cp_async_wait_group<1>();
    } else {
      cp_async_wait_group<0>();
    }
    __syncthreads();
    const T* const tile_a = shared + stage * 2 * kTile * kStep;
    const T* const tile_b = tile_a + kTile * kStep;
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      uint32_t fa[4], fb[4];
      ldmatrix_x4(fa, tile_a + at(warp * 16 + lane % 16, chunk + lane / 16));
      for (int j = 0; j < 8; j += 2) {
        ldmatrix_x4(fb, tile_b + at(j * 8 + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
        mma_m16n8k16<T>(sum[j], fa, fb[0], fb[1]);
        mma_m16n8k16<T>(sum[j + 1], fa, fb[2], fb[3]);
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < 8; ++j) {
    for (int half = 0; half < 2; ++half) {
      const int row = m0 + warp * 16 + lane / 4 + half * 8, column = n0 + j * 8 + lane % 4 * 2;
      if (row < m && column < n) store_vec(c + row * n + column, Vec<float, 2>{sum[j][half * 2], sum[j][half * 2 + 1]});
    }
  }
}

}  // namespace vlmops
