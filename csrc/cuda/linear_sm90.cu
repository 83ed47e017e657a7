// y [M, N] = residual + mask * tanh(gate) * act(x W^T + bias) on sm_90a (tile/gemm_sm90.cuh). Experimental: linear.cu
// is what other GPUs run, and this one by default.
//
// VLMOPS_T: bf16 or fp16; VLMOPS_ACT: the activation; VLMOPS_SCALE: the gate is LayerScale, without tanh; VLMOPS_BN:
// columns of a tile; VLMOPS_STAGES: steps of 64 along k under way; VLMOPS_OUT: elements of an access to bias, gate,
// residual and y.
#include "epilogue/output.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "tile/gemm.cuh"
#include "tile/gemm_sm90.cuh"

namespace vlmops {

using T = VLMOPS_T;
constexpr Activation kActivation = Activation::VLMOPS_ACT;

#ifdef VLMOPS_ENTRY_linear_gemm_sm90
// x [M, K] in boxes of 128 x 64, W [N, K] of VLMOPS_BN x 64. Any grid: a block takes every gridDim.x-th tile.
VLMOPS_KERNEL(linear_gemm_sm90)
(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, const T* bias, const T* gate,
 const uint8_t* mask, const T* residual, T* out, int64_t r_stride, int m, int n, int k, int gate_step) {
  using Gemm = WarpgroupGemm<T, VLMOPS_BN, VLMOPS_STAGES>;
  static_assert(Gemm::kThreads == VLMOPS_THREADS, "a producer and two consumers");
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  __shared__ Gemm::Barriers barriers;
  T* const ring = swizzle_aligned(dynamic);
  barriers.init(2 * kWarpgroup / kWarp);
  const int tiles_m = ceil_div(m, Gemm::kRows), tiles_n = ceil_div(n, VLMOPS_BN);
  const int tiles = tiles_m * tiles_n, step = static_cast<int>(gridDim.x);
  typename Gemm::Position at;
  int row, column;
  if (warpgroup_id() == 0) {
    give_registers<Gemm::kProducerRegisters>();
    if (threadIdx.x != 0) return;
    tma_prefetch(x);
    tma_prefetch(weight);
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += step) {
      grouped<8>(tile, tiles_m, tiles_n, row, column);
      const int m0 = row * Gemm::kRows, n0 = column * VLMOPS_BN;
      Gemm::produce(ring, barriers, at, k, [&](T* rows, T* columns, uint64_t* full, int from) {
        tma_load(rows, x, full, from, m0);
        tma_load(columns, weight, full, from, n0);
      });
    }
    return;
  }
  take_registers<Gemm::kConsumerRegisters>();
  const Epilogue<T> epilogue{bias, gate, mask, residual, out, r_stride, gate_step};
  Gemm gemm;
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += step) {
    grouped<8>(tile, tiles_m, tiles_n, row, column);
    const int m0 = row * Gemm::kRows, n0 = column * VLMOPS_BN;
    gemm.multiply(ring, barriers, at, k);
    ColumnTerms<8> terms;
    gemm.each([&](int c) { terms = column_terms<VLMOPS_OUT, 8, VLMOPS_SCALE>(epilogue, n0 + c, n - n0 - c); },
              [&](int r, int c, float (&v)[8]) {
                if (m0 + r < m) finish_row<kActivation, VLMOPS_OUT>(epilogue, terms, v, m0 + r, n0 + c, n);
              });
  }
}
#endif

}  // namespace vlmops
