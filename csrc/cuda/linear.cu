// y [M, N] = residual + mask * tanh(gate) * act(x W^T + bias), x [M, K], W [N, K]: by tensor cores, exactly in float,
// and for few rows as a stream of the weight.
//
// VLMOPS_T: type of all matrices; VLMOPS_ACT: the activation; VLMOPS_SCALE: the gate is LayerScale, without tanh;
// VLMOPS_VEC: elements of an access to x and W; VLMOPS_OUT: of one to bias, gate, residual and y.
#include "epilogue/output.cuh"
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/gemm.cuh"
#include "tile/gemm_float.cuh"
#include "tile/stream.cuh"

namespace vlmops {

using T = VLMOPS_T;
constexpr Activation kActivation = Activation::VLMOPS_ACT;

#ifdef VLMOPS_ENTRY_linear_gemm
// A tile of VLMOPS_BM x VLMOPS_BN a block, VLMOPS_BK along k at a time, VLMOPS_STAGES of them under way; a warp has
// VLMOPS_WM x VLMOPS_WN.
VLMOPS_KERNEL_RESIDENT(linear_gemm, 512 / VLMOPS_THREADS)
(const T* x, const T* weight, const T* bias, const T* gate, const uint8_t* mask, const T* residual, T* out,
 int64_t x_stride, int64_t w_stride, int64_t r_stride, int m, int n, int k, int gate_step) {
  using Gemm = GemmTile<T, VLMOPS_BM, VLMOPS_BN, VLMOPS_BK, VLMOPS_WM, VLMOPS_WN, VLMOPS_STAGES, VLMOPS_VEC>;
  static_assert(Gemm::kThreads == VLMOPS_THREADS, "a warp to each part of the tile");
  VLMOPS_DYNAMIC_SHARED(T, shared);
  int m0, n0;
  grouped<8>(static_cast<int>(blockIdx.x), ceil_div(m, VLMOPS_BM), ceil_div(n, VLMOPS_BN), m0, n0);
  m0 *= VLMOPS_BM;
  n0 *= VLMOPS_BN;
  Gemm gemm;
  gemm.run(shared, x, x_stride, m, m0, weight, w_stride, n, n0, k);
  const Epilogue<T> epilogue{bias, gate, mask, residual, out, r_stride, gate_step};
  ColumnTerms<8> terms;
  gemm.each(
      [&](int column) { terms = column_terms<VLMOPS_OUT, 8, VLMOPS_SCALE>(epilogue, n0 + column, n - n0 - column); },
      [&](int row, int column, float (&v)[8]) {
        if (m0 + row < m) finish_row<kActivation, VLMOPS_OUT>(epilogue, terms, v, m0 + row, n0 + column, n);
      });
}
#endif

#ifdef VLMOPS_ENTRY_linear_few_rows
// VLMOPS_ROWS rows, VLMOPS_COLS columns a warp: its lanes stride along k, each with its own sums, reduced once.
VLMOPS_KERNEL(linear_few_rows)
(const T* x, const T* weight, const T* bias, const T* gate, const uint8_t* mask, const T* residual, T* out,
 int64_t x_stride, int64_t w_stride, int64_t r_stride, int n, int k, int gate_step) {
  using Stream = StreamedRows<T, VLMOPS_ROWS, VLMOPS_COLS, 1, VLMOPS_VEC>;
  const int first = (static_cast<int>(blockIdx.x) * (VLMOPS_THREADS / kWarp) + warp_id()) * VLMOPS_COLS;
  if (first >= n) return;
  Stream stream;
  stream.run(
      MatrixRows<T, false>{x, x_stride, 0, VLMOPS_ROWS}, Neighbours{},
      [&](int) { return MatrixRows<T, false>{weight, w_stride, 0, n}; }, first, k);
  const int row = Stream::row(), column = first + Stream::column();
  if (row >= VLMOPS_ROWS || column >= n) return;
  const Epilogue<T> epilogue{bias, gate, mask, residual, out, r_stride, gate_step};
  const auto terms = column_terms<1, 1, VLMOPS_SCALE>(epilogue, column, 1);
  finish_row<kActivation, 1>(epilogue, terms, stream.mine[0], row, column, n);
}
#endif

#ifdef VLMOPS_ENTRY_linear_gemm_float
VLMOPS_KERNEL_RESIDENT(linear_gemm_float, 2)
(const T* x, const T* weight, const T* bias, const T* gate, const uint8_t* mask, const T* residual, T* out,
 int64_t x_stride, int64_t w_stride, int64_t r_stride, int m, int n, int k, int gate_step) {
  using Tile = FloatTile<1, VLMOPS_VEC>;
  static_assert(VLMOPS_THREADS == Tile::kThreads && sizeof(T) == 4, "float");
  __shared__ __align__(16) Tile::Shared shared;
  int m0, n0;
  grouped<8>(static_cast<int>(blockIdx.x), ceil_div(m, Tile::kTile), ceil_div(n, Tile::kTile), m0, n0);
  m0 *= Tile::kTile;
  n0 *= Tile::kTile;
  Tile tile;
  tile.run(
      shared, MatrixRows<T, false>{x, x_stride, m0, m}, Neighbours{},
      [&](int) { return MatrixRows<T, false>{weight, w_stride, n0, n}; }, k);
  const Epilogue<T> epilogue{bias, gate, mask, residual, out, r_stride, gate_step};
  const int column = n0 + Tile::column();
  const auto terms = column_terms<VLMOPS_OUT, Tile::kEach, VLMOPS_SCALE>(epilogue, column, n - column);
  VLMOPS_UNROLL
  for (int i = 0; i < Tile::kEach; ++i) {
    const int row = m0 + Tile::row() + i;
    if (row < m) finish_row<kActivation, VLMOPS_OUT>(epilogue, terms, tile.sums[i][0], row, column, n);
  }
}
#endif

}  // namespace vlmops
