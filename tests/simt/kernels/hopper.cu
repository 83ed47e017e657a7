// sm_90a's instructions as they are, and a ring of tiles with the bugs that they make possible. See test_hopper.py.
#include "mma/sm90.cuh"
#include "ptx/memory.cuh"
#include "ptx/sm90.cuh"
#include "ptx/warp.cuh"

namespace vlmops {

#ifdef VLMOPS_ENTRY_box  // out [rows * 64]: shared memory after a copy of a box of [rows, 64] from (x, y), or (x, z, y)
VLMOPS_KERNEL(box)(const __grid_constant__ TensorMap map, uint16_t* out, int rank, int rows, int x, int y, int z) {
  VLMOPS_DYNAMIC_SHARED(uint16_t, dynamic);
  __shared__ uint64_t full;
  uint16_t* const tile = swizzle_aligned(dynamic);
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    mbarrier_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_prefetch(map);
    mbarrier_arrive_expect(&full, rows * 128);
    if (rank == 2) tma_load(tile, map, &full, x, y);
    else tma_load(tile, map, &full, x, z, y);
  }
  mbarrier_wait(&full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < rows * 64; i += VLMOPS_THREADS) out[i] = tile[i];
}
#endif

#ifdef VLMOPS_ENTRY_product
// d [128, N / 2] registers += A B; A: a [64, K], or its registers [128, K / 4]; b [N, K], or [K, N] where
// VLMOPS_ALONG_N.
VLMOPS_KERNEL(product)
(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const uint32_t* registers, float* d, int k) {
  using T = VLMOPS_T;
  constexpr int N = VLMOPS_N, kAtoms = (N + 63) / 64;
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  __shared__ uint64_t full;
  T* const a_tile = swizzle_aligned(dynamic);
  T* const b_tile = a_tile + 64 * 64;
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    mbarrier_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int columns = VLMOPS_ALONG_N ? kAtoms * 64 * k : N * 64;
    mbarrier_arrive_expect(&full, (64 * 64 + columns) * 2);
    tma_load(a_tile, a, &full, 0, 0);
    if (VLMOPS_ALONG_N) {
      for (int atom = 0; atom < kAtoms; ++atom) tma_load(b_tile + atom * 64 * k, b, &full, 64 * atom, 0);
    } else {
      tma_load(b_tile, b, &full, 0, 0);
    }
  }
  mbarrier_wait(&full, 0);
  float sums[N / 8][4];
  float* const mine = d + static_cast<int>(threadIdx.x) * (N / 2);
  for (int i = 0; i < N / 2; ++i) sums[i / 4][i % 4] = mine[i];
  wgmma_fence();
  for (int step = 0; step < k; step += 16) {
    const uint64_t columns =
        VLMOPS_ALONG_N ? tile_descriptor(b_tile + step * 64, 128 * k) : tile_descriptor(b_tile + step);
    if (registers != nullptr) {
      uint32_t r[4];
      for (int i = 0; i < 4; ++i) r[i] = registers[(static_cast<int>(threadIdx.x) * (k / 16) + step / 16) * 4 + i];
      wgmma<N, T, VLMOPS_ALONG_N>(sums, r, columns, true);
    } else {
      wgmma<N, T, VLMOPS_ALONG_N>(sums, tile_descriptor(a_tile + step), columns, true);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) mine[i] = sums[i / 4][i % 4];
}
#endif

#ifdef VLMOPS_ENTRY_ring
// d [128, 32] registers: of x [64, 64 tiles], the sum over tiles of X X^T; a producer warp and a consumer warpgroup
// with a ring of two stages. bug 0: none.
VLMOPS_KERNEL(ring)(const __grid_constant__ TensorMap x, float* d, int tiles, int bug) {
  VLMOPS_DYNAMIC_SHARED(bf16, dynamic);
  __shared__ uint64_t full[2], empty[2];
  bf16* const ring = swizzle_aligned(dynamic);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], bug == 1 ? 5 : 4);  // 1: an arrival too many is waited for
    }
    if (bug != 2) mbarrier_fence();  // 2: TMA may not see the barrier
  }
  if (bug != 3) __syncthreads();  // 3: nor may the other threads
  if (threadIdx.x >= 128) {
    if (threadIdx.x != 128) return;
    for (int i = 0; i < tiles; ++i) {
      const int stage = i % 2, parity = i / 2 % 2;
      if (bug != 4) mbarrier_wait(&empty[stage], parity ^ (bug == 5 ? 0 : 1));  // 4: not waited for; 5: wrong parity
      if (bug == 6) mbarrier_arrive(&full[stage]);                              // 6: without the bytes
      else mbarrier_arrive_expect(&full[stage], bug == 7 ? 4096 : 8192);        // 7: fewer bytes
      if (bug == 8) mbarrier_arrive(&full[stage]);                              // 8: twice
      tma_load(ring + stage * 4096 + (bug == 9 ? 64 : 0), x, &full[stage], i * 64, 0);  // 9: not where a swizzle begins
    }
    return;
  }
  float sums[8][4];
  for (int i = 0; i < 32; ++i) sums[i / 4][i % 4] = 0.f;
  for (int i = 0; i < tiles; ++i) {
    const int stage = i % 2, parity = i / 2 % 2;
    if (bug != 10) mbarrier_wait(&full[stage], parity ^ (bug == 11 ? 1 : 0));  // 10: not waited for; 11: wrong parity
    const bf16* const tile = ring + stage * 4096;
    if (bug == 12) ring[stage * 4096 + static_cast<int>(threadIdx.x)] = bf16{0};  // 12: without fence.proxy.async
    if (bug != 13) wgmma_fence();                                                 // 13: registers are not ordered
    for (int step = 0; step < 64; step += 16) {
      const bf16* const at = tile + step + (bug == 14 ? 8 * 64 * (i % 2) + 64 : 0);  // 14: begins inside the swizzle
      if (bug == 15 && threadIdx.x >= 96 && step == 48) continue;                    // 15: three of four warps
      wgmma<64, bf16>(sums, tile_descriptor(at), tile_descriptor(at), true);
    }
    if (bug != 16) wgmma_commit();                                    // 16: never committed
    if (bug == 17 && lane_id() == 0) mbarrier_arrive(&empty[stage]);  // 17: given back while it is read
    if (bug == 18) sums[0][0] += 1.f;                                 // 18: accumulators used
    if (bug != 19) wgmma_wait<0>();                                   // 19: not waited for
    if (bug != 17 && lane_id() == 0) mbarrier_arrive(&empty[stage]);
    if (bug == 20 && threadIdx.x == 0) mbarrier_arrive(&empty[stage]);  // 20: twice by one warp
  }
  for (int i = 0; i < 32; ++i) d[static_cast<int>(threadIdx.x) * 32 + i] = sums[i / 4][i % 4];
}
#endif

}  // namespace vlmops
