// y [M, N] = residual + mask * tanh(gate) * act(x W^T + bias), x [M, K], with a weight in int8, int4 or fp8 e4m3 that
// is read in its own bytes: for few rows as a stream past sums in float, for more by tensor cores, decoded on its way
// to shared memory.
//
// VLMOPS_T: type of x, bias, gate, residual and y; VLMOPS_ACT: the activation; VLMOPS_KIND: of the codes; VLMOPS_GROUP:
// columns that share a scale, 0: all; VLMOPS_ZERO: there are zero-points; VLMOPS_VEC: elements of an access to x;
// VLMOPS_EACH: of one to the scales and zero-points.
#include "epilogue/output.cuh"
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/dequantise.cuh"
#include "tile/gemm.cuh"

namespace vlmops {

using T = VLMOPS_T;

#ifdef VLMOPS_ENTRY_quantized_few_rows
// What the codes of VLMOPS_COLS columns in one group stand for: (code - offset) * scale.
struct Terms {
  float scale[VLMOPS_COLS], offset[VLMOPS_COLS];
};

// Of columns `first` on, `count` of them inside the matrix.
template <class Weight>
VLMOPS_DEVICE Terms group_terms(const float* scale, const uint8_t* zero, int group, int first, int n) {
  Terms terms;
  const int64_t at = static_cast<int64_t>(group) * n + first;
  read_columns<VLMOPS_EACH>(terms.scale, scale + at, n - first);
  if constexpr (VLMOPS_ZERO) read_columns<VLMOPS_EACH>(terms.offset, zero + at, n - first);
  VLMOPS_UNROLL
  for (int c = 0; c < VLMOPS_COLS; ++c) {
    terms.scale[c] *= Weight::kFactor;
    terms.offset[c] = Weight::kOffset + (VLMOPS_ZERO ? terms.offset[c] : Weight::kZero);
  }
  return terms;
}

// VLMOPS_ROWS rows. VLMOPS_SPLIT warps share VLMOPS_COLS columns: their lanes stride along k, VLMOPS_BYTES of the
// weight an access, each lane with its own sums, reduced once.
VLMOPS_KERNEL(quantized_few_rows)
(const T* x, const uint8_t* data, const float* scale, const uint8_t* zero, const T* bias, const T* gate,
 const uint8_t* mask, const T* residual, T* out, int64_t x_stride, int64_t d_stride, int64_t r_stride, int n, int k,
 int gate_step) {
  using Weight = Codes<Code::VLMOPS_KIND>;
  constexpr int kRows = VLMOPS_ROWS, kColumns = VLMOPS_COLS, kSplit = VLMOPS_SPLIT, kBytes = VLMOPS_BYTES;
  constexpr int kWarps = VLMOPS_THREADS / kWarp, kPiece = 8, kWide = VLMOPS_VEC;
  static_assert(kRows * kColumns <= kWarp, "a lane to each result");
  static_assert(kWarps % kSplit == 0 && kBytes % kPiece == 0 && kPiece % kWide == 0, "whole accesses");
  const int part = warp_id() % kSplit;
  const int first = (static_cast<int>(blockIdx.x) * (kWarps / kSplit) + warp_id() / kSplit) * kColumns;
  if (kSplit == 1 && first >= n) return;

  float sums[kRows][kColumns] = {};
  uint32_t bad[kColumns] = {};
  if (first < n) {
    const uint8_t* row_of[kColumns];
    VLMOPS_UNROLL
    for (int c = 0; c < kColumns; ++c) row_of[c] = data + static_cast<int64_t>(min_of(first + c, n - 1)) * d_stride;
    Terms terms;
    if (VLMOPS_GROUP == 0) terms = group_terms<Weight>(scale, zero, 0, first, n);
    VLMOPS_UNROLL_N(2)
    for (int byte = (part * kWarp + lane_id()) * kBytes; Weight::column_of(byte) < k; byte += kSplit * kWarp * kBytes) {
      Vec<uint32_t, kBytes / 4> words[kColumns];
      VLMOPS_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        words[c] = load_vec_readonly<kBytes / 4>(reinterpret_cast<const uint32_t*>(row_of[c] + byte));
        VLMOPS_UNROLL
        for (int i = 0; i < kBytes / 4; ++i) bad[c] |= Weight::nan(words[c][i]);
      }
      VLMOPS_UNROLL
      for (int run = 0; run < Weight::kRuns; ++run) {
        const int column = Weight::column_of(byte) + run * Weight::kApart;
        // Both runs of an int4 access lie in one group where a group is whole blocks.
        if (VLMOPS_GROUP != 0 && (run == 0 || VLMOPS_GROUP < 2 * Weight::kApart)) {
          terms = group_terms<Weight>(scale, zero, column / max_of(1, VLMOPS_GROUP), first, n);
        }
        VLMOPS_UNROLL
        for (int piece = 0; piece < kBytes; piece += kPiece) {
          float w[kColumns][kPiece];
          VLMOPS_UNROLL
          for (int c = 0; c < kColumns; ++c) {
            VLMOPS_UNROLL
            for (int i = 0; i < kPiece; i += 4) {
              Weight::decode(w[c] + i, words[c][(piece + i) / 4], run, terms.offset[c]);
            }
          }
          VLMOPS_UNROLL
          for (int r = 0; r < kRows; ++r) {
            float a[kPiece];
            read_columns<kWide>(a, x + r * x_stride + column + piece, k - column - piece);
            VLMOPS_UNROLL
            for (int c = 0; c < kColumns; ++c) {
              float sum = VLMOPS_GROUP == 0 ? sums[r][c] : 0.f;
              VLMOPS_UNROLL
              for (int i = 0; i < kPiece; ++i) sum = fma(a[i], w[c][i], sum);
              sums[r][c] = VLMOPS_GROUP == 0 ? sum : fma(terms.scale[c], sum, sums[r][c]);
            }
          }
        }
      }
    }
    VLMOPS_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const float factor = bad[c] != 0 ? bits_float(0x7fffffffu) : VLMOPS_GROUP == 0 ? terms.scale[c] : 1.f;
      VLMOPS_UNROLL
      for (int r = 0; r < kRows; ++r) sums[r][c] *= factor;
    }
  }

  float mine[1] = {0.f};
  VLMOPS_UNROLL
  for (int r = 0; r < kRows; ++r) {
    VLMOPS_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const float sum = warp_sum(sums[r][c]);
      if (lane_id() == r * kColumns + c) mine[0] = sum;
    }
  }
  if constexpr (kSplit > 1) {
    __shared__ float parts[kWarps][kWarp];
    parts[warp_id()][lane_id()] = mine[0];
    __syncthreads();
    if (part != 0) return;
    VLMOPS_UNROLL
    for (int i = 1; i < kSplit; ++i) mine[0] += parts[warp_id() + i][lane_id()];
  }
  const int row = lane_id() / kColumns, column = first + lane_id() % kColumns;
  if (row >= kRows || column >= n) return;
  const Epilogue<T> epilogue{bias, gate, mask, residual, out, r_stride, gate_step};
  const auto terms = column_terms<1, 1>(epilogue, column, 1);
  finish_row<Activation::VLMOPS_ACT, 1>(epilogue, terms, mine, row, column, n);
}
#endif

#ifdef VLMOPS_ENTRY_quantized_gemm
// Tiles as in linear_gemm. Steps of x and the codes of one of the weight are under way while another is multiplied. The
// large tile may have all registers: its shared memory leaves room for one block on most GPUs.
VLMOPS_KERNEL_RESIDENT(quantized_gemm, VLMOPS_THREADS == 256 ? 1 : 3)
(const T* x, const uint8_t* data, const float* scale, const uint8_t* zero, const T* bias, const T* gate,
 const uint8_t* mask, const T* residual, T* out, int64_t x_stride, int64_t d_stride, int64_t r_stride, int m, int n,
 int k, int gate_step) {
  using Gemm = GemmTile<T, VLMOPS_BM, VLMOPS_BN, VLMOPS_BK, VLMOPS_WM, VLMOPS_WN, VLMOPS_STAGES, VLMOPS_VEC>;
  using Rows = TileSource<T, VLMOPS_BM, VLMOPS_BK / 8, VLMOPS_THREADS, VLMOPS_VEC>;
  using Weight = DequantisedRows<T, Code::VLMOPS_KIND, VLMOPS_GROUP, VLMOPS_BN, VLMOPS_THREADS>;
  static_assert(Gemm::kThreads == VLMOPS_THREADS && Weight::kStep == VLMOPS_BK, "a warp to each part of the tile");
  VLMOPS_DYNAMIC_SHARED(T, shared);
  int m0, n0;
  grouped<8>(static_cast<int>(blockIdx.x), ceil_div(m, VLMOPS_BM), ceil_div(n, VLMOPS_BN), m0, n0);
  m0 *= VLMOPS_BM;
  n0 *= VLMOPS_BN;
  const PackedWeight weight{data, scale, zero, d_stride, n};
  CopiedRows<Rows, Neighbours> rows{Rows(MatrixRows<T, false>{x, x_stride, m0, m}), Neighbours{}};
  Weight columns(weight, n0);
  Gemm gemm;
  gemm.run_of(shared, rows, columns, k);
  const Epilogue<T> epilogue{bias, gate, mask, residual, out, r_stride, gate_step};
  ColumnTerms<8> terms;
  float factor[8];
  gemm.each(
      [&](int column) {
        terms = column_terms<VLMOPS_OUT, 8>(epilogue, n0 + column, n - n0 - column);
        if (VLMOPS_GROUP == 0) read_columns<VLMOPS_EACH>(factor, scale + n0 + column, n - n0 - column);
      },
      [&](int row, int column, float (&v)[8]) {
        if (m0 + row >= m) return;
        VLMOPS_UNROLL
        for (int i = 0; VLMOPS_GROUP == 0 && i < 8; ++i) v[i] *= factor[i] * Weight::Weight::kFactor;
        finish_row<Activation::VLMOPS_ACT, VLMOPS_OUT>(epilogue, terms, v, m0 + row, n0 + column, n);
      });
}
#endif

}  // namespace vlmops
