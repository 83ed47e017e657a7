// y [M, N] = residual + mask * tanh(gate) * act(x W^T + bias), x [M, K], W [N, K]: by tensor cores, exactly in float,
// and for few rows as a stream of the weight.
//
// VLMOPS_T: type of all matrices; VLMOPS_ACT: the activation; VLMOPS_VEC: elements of an access to x and W; VLMOPS_OUT:
// of one to bias, gate, residual and y.
#include "epilogue/output.cuh"
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/gemm.cuh"

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
  gemm.each([&](int column) { terms = column_terms<VLMOPS_OUT, 8>(epilogue, n0 + column, n - n0 - column); },
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
  constexpr int kRows = VLMOPS_ROWS, kColumns = VLMOPS_COLS, kVec = VLMOPS_VEC;
  static_assert(kRows * kColumns <= kWarp, "a lane to each result");
  const int first = (static_cast<int>(blockIdx.x) * (VLMOPS_THREADS / kWarp) + warp_id()) * kColumns;
  if (first >= n) return;
  const T* row_of[kColumns];  // of the weight; past the last one, the last again
  VLMOPS_UNROLL
  for (int c = 0; c < kColumns; ++c) row_of[c] = weight + static_cast<int64_t>(min_of(first + c, n - 1)) * w_stride;
  float sums[kRows][kColumns];
  VLMOPS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    VLMOPS_UNROLL
    for (int c = 0; c < kColumns; ++c) sums[r][c] = 0.f;
  }
  VLMOPS_UNROLL_N(2)
  for (int i = lane_id() * kVec; i < k; i += kWarp * kVec) {
    Vec<T, kVec> w[kColumns];
    VLMOPS_UNROLL
    for (int c = 0; c < kColumns; ++c) w[c] = load_vec_readonly<kVec>(row_of[c] + i);
    VLMOPS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const auto part = load_vec_readonly<kVec>(x + r * x_stride + i);
      VLMOPS_UNROLL
      for (int j = 0; j < kVec; ++j) {
        VLMOPS_UNROLL
        for (int c = 0; c < kColumns; ++c) sums[r][c] = fma(to_float(part[j]), to_float(w[c][j]), sums[r][c]);
      }
    }
  }
  float mine[1] = {0.f};  // lane r kColumns + c finishes row r, column c
  VLMOPS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    VLMOPS_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const float sum = warp_sum(sums[r][c]);
      if (lane_id() == r * kColumns + c) mine[0] = sum;
    }
  }
  const int row = lane_id() / kColumns, column = first + lane_id() % kColumns;
  if (row >= kRows || column >= n) return;
  const Epilogue<T> epilogue{bias, gate, mask, residual, out, r_stride, gate_step};
  finish_row<kActivation, 1>(epilogue, column_terms<1, 1>(epilogue, column, 1), mine, row, column, n);
}
#endif

#ifdef VLMOPS_ENTRY_linear_gemm_float
// Exact float products: tiles of 64 x 64, a thread has 4 x 4 of them, 16 along k at a time from shared memory; the next
// 16 wait in registers.
VLMOPS_KERNEL_RESIDENT(linear_gemm_float, 2)
(const T* x, const T* weight, const T* bias, const T* gate, const uint8_t* mask, const T* residual, T* out,
 int64_t x_stride, int64_t w_stride, int64_t r_stride, int m, int n, int k, int gate_step) {
  constexpr int kTile = 64, kDepth = 16, kEach = 4;
  static_assert(VLMOPS_THREADS == 256 && sizeof(T) == 4, "a thread loads four elements of a row of each operand");
  // x and W, k first; eights of rows change places by k / 4, so that a warp writes 8 rows x 4 of these to all banks.
  __shared__ __align__(16) float tiles[2][kDepth][kTile];
  int m0, n0;
  grouped<8>(static_cast<int>(blockIdx.x), ceil_div(m, kTile), ceil_div(n, kTile), m0, n0);
  m0 *= kTile;
  n0 *= kTile;
  const int thread = static_cast<int>(threadIdx.x);
  const int load_row = thread / 4, load_k = thread % 4 * 4;
  const T* const from[2] = {x + static_cast<int64_t>(min_of(m0 + load_row, m - 1)) * x_stride + load_k,
                            weight + static_cast<int64_t>(min_of(n0 + load_row, n - 1)) * w_stride + load_k};
  float next[2][4];
  const auto load = [&](int at) {
    VLMOPS_UNROLL
    for (int o = 0; o < 2; ++o) {
      read_columns<VLMOPS_VEC>(next[o], from[o] + at, k - at - load_k);
    }
  };
  float sums[kEach][kEach];
  VLMOPS_UNROLL
  for (int i = 0; i < kEach; ++i) {
    VLMOPS_UNROLL
    for (int j = 0; j < kEach; ++j) sums[i][j] = 0.f;
  }
  const int row = thread / 16 * kEach, column = thread % 16 * kEach;
  load(0);
  for (int at = 0; at < k; at += kDepth) {
    VLMOPS_UNROLL
    for (int o = 0; o < 2; ++o) {
      VLMOPS_UNROLL
      for (int i = 0; i < 4; ++i) tiles[o][load_k + i][load_row ^ load_k * 2] = next[o][i];
    }
    __syncthreads();
    if (at + kDepth < k) load(at + kDepth);
    VLMOPS_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      const auto a = load_vec<kEach>(&tiles[0][d][row ^ d / 4 * 8]);
      const auto b = load_vec<kEach>(&tiles[1][d][column ^ d / 4 * 8]);
      VLMOPS_UNROLL
      for (int i = 0; i < kEach; ++i) {
        VLMOPS_UNROLL
        for (int j = 0; j < kEach; ++j) sums[i][j] = fma(a[i], b[j], sums[i][j]);
      }
    }
    __syncthreads();
  }
  const Epilogue<T> epilogue{bias, gate, mask, residual, out, r_stride, gate_step};
  const auto terms = column_terms<VLMOPS_OUT, kEach>(epilogue, n0 + column, n - n0 - column);
  VLMOPS_UNROLL
  for (int i = 0; i < kEach; ++i) {
    if (m0 + row + i < m) finish_row<kActivation, VLMOPS_OUT>(epilogue, terms, sums[i], m0 + row + i, n0 + column, n);
  }
}
#endif

}  // namespace vlmops
