// out [tokens, E] = patch vectors W^T + bias + position: an implicit product, whose one operand is read from pixels in
// place, by tensor cores and exactly in float.
//
// VLMOPS_T: type of W, bias, position and out; VLMOPS_PIXEL: of images; VLMOPS_FORM, VLMOPS_C, VLMOPS_F, VLMOPS_P,
// VLMOPS_MERGE, VLMOPS_LAST, VLMOPS_LINE, VLMOPS_WIDE, VLMOPS_NORM: PatchShape's; VLMOPS_VEC: elements of an access to
// W; VLMOPS_OUT: of one to bias, position and out.
#include "epilogue/output.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "tile/gemm.cuh"
#include "tile/gemm_float.cuh"
#include "tile/patch_rows.cuh"
#include "tile/pixels.cuh"

namespace vlmops {

using T = VLMOPS_T;
using Shape = PatchShape<VLMOPS_PIXEL, Form::VLMOPS_FORM, VLMOPS_C, VLMOPS_F, VLMOPS_P, VLMOPS_MERGE, VLMOPS_LAST,
                         VLMOPS_LINE, VLMOPS_WIDE, VLMOPS_NORM>;
using Pixel = Shape::Pixel;
using Start = PatchStart<Pixel>;

// The arguments of both kernels.
#define VLMOPS_ARGUMENTS                                                                                             \
  const Pixel *images, const int64_t *table, const float *pairs, const T *weight, const T *bias, const T *position,  \
      T *out, int64_t image, int64_t frame, int64_t channel, int64_t line, int64_t column, int64_t w_stride,         \
      int64_t p_stride, int tokens, int n, int count, int of_image, int of_frame, int of_line, int frames, int each, \
      float shift0, float shift1, float shift2, float shift3, float scale0, float scale1, float scale2, float scale3
#define VLMOPS_PATCHES                                                                                          \
  Patches<Shape> {                                                                                              \
    images, table, tokens, count, of_image, of_frame, of_line, frames, image, {frame, channel, line, column}, { \
      {shift0, shift1, shift2, shift3}, {scale0, scale1, scale2, scale3}, pairs                                 \
    }                                                                                                           \
  }

// Where the patches of a tile begin; the block's threads see all after the barrier.
template <int Rows>
VLMOPS_DEVICE void find_starts(Start* starts, const Patches<Shape>& patches, int first) {
  for (int row = static_cast<int>(threadIdx.x); row < Rows; row += VLMOPS_THREADS) {
    starts[row] = patches.start(first + row);
  }
  __syncthreads();
}

// Adds the position, one of `each` that repeat, to N neighbouring columns of a token and writes them.
template <int N>
VLMOPS_DEVICE void finish_token(float (&v)[N], const float (&bias)[N], const T* position, int64_t p_stride, int each,
                                T* out, int token, int column, int columns) {
  const int count = columns - column;
  float place[N] = {};
  if (position != nullptr) read_columns<VLMOPS_OUT>(place, position + token % each * p_stride + column, count);
  VLMOPS_UNROLL
  for (int i = 0; i < N; ++i) v[i] += bias[i] + place[i];
  write_columns<VLMOPS_OUT>(out + static_cast<int64_t>(token) * columns + column, v, count);
}

#ifdef VLMOPS_ENTRY_patchify_gemm
// A tile of VLMOPS_BM tokens x VLMOPS_BN columns a block, VLMOPS_BK of a patch vector at a time, VLMOPS_STAGES of them
// under way; a warp has VLMOPS_WM x VLMOPS_WN.
VLMOPS_KERNEL_RESIDENT(patchify_gemm, 512 / VLMOPS_THREADS)(VLMOPS_ARGUMENTS) {
  using Gemm = GemmTile<T, VLMOPS_BM, VLMOPS_BN, VLMOPS_BK, VLMOPS_WM, VLMOPS_WN, VLMOPS_STAGES, VLMOPS_VEC>;
  static_assert(Gemm::kThreads == VLMOPS_THREADS, "a warp to each part of the tile");
  VLMOPS_DYNAMIC_SHARED(T, shared);
  __shared__ __align__(16) Start starts[VLMOPS_BM];
  int m0, n0;
  grouped<8>(static_cast<int>(blockIdx.x), ceil_div(tokens, VLMOPS_BM), ceil_div(n, VLMOPS_BN), m0, n0);
  m0 *= VLMOPS_BM;
  n0 *= VLMOPS_BN;
  const Patches<Shape> patches = VLMOPS_PATCHES;
  find_starts<VLMOPS_BM>(starts, patches, m0);
  PatchRows<T, Shape, VLMOPS_BM, Gemm::kChunks, VLMOPS_THREADS> rows(patches, starts);
  Gemm gemm;
  const WeightRows<T, VLMOPS_BN, Gemm::kChunks, VLMOPS_THREADS, VLMOPS_VEC> columns(weight, w_stride, n0, n);
  gemm.run_of(shared, rows, columns, Shape::kLength);
  float terms[8];
  gemm.each([&](int at) { read_terms<VLMOPS_OUT>(terms, bias, n0 + at, n - n0 - at); },
            [&](int row, int at, float (&v)[8]) {
              if (m0 + row < tokens) finish_token(v, terms, position, p_stride, each, out, m0 + row, n0 + at, n);
            });
}
#endif

#ifdef VLMOPS_ENTRY_patchify_gemm_float
VLMOPS_KERNEL_RESIDENT(patchify_gemm_float, 2)(VLMOPS_ARGUMENTS) {
  using Tile = FloatTile<1, VLMOPS_VEC>;
  static_assert(VLMOPS_THREADS == Tile::kThreads && sizeof(T) == 4, "float");
  constexpr int kWide = min_of(Shape::kWide, 4);
  __shared__ __align__(16) Tile::Shared shared;
  int m0, n0;
  grouped<8>(static_cast<int>(blockIdx.x), ceil_div(tokens, Tile::kTile), ceil_div(n, Tile::kTile), m0, n0);
  m0 *= Tile::kTile;
  n0 *= Tile::kTile;
  const Patches<Shape> patches = VLMOPS_PATCHES;
  const Start start = patches.start(m0 + Tile::load_row());
  Tile tile;
  tile.run_from(
      shared,
      [&](float (&to)[4], int k) {
        VLMOPS_UNROLL
        for (int i = 0; i < 4; i += kWide) {
          Vec<float, kWide> part = {};
          if (start.last >= 0 && k + i < Shape::kLength) {
            part = patches.convert<float>(load_vec_readonly<kWide>(patches.at(start, k + i)), k + i);
          }
          VLMOPS_UNROLL
          for (int j = 0; j < kWide; ++j) to[i + j] = part[j];
        }
      },
      [&](int) { return MatrixRows<T, false>{weight, w_stride, n0, n}; }, Shape::kLength);
  const int at = n0 + Tile::column();
  float terms[Tile::kEach];
  read_terms<VLMOPS_OUT>(terms, bias, at, n - at);
  VLMOPS_UNROLL
  for (int i = 0; i < Tile::kEach; ++i) {
    const int token = m0 + Tile::row() + i;
    if (token < tokens) finish_token(tile.sums[i][0], terms, position, p_stride, each, out, token, at, n);
  }
}
#endif

}  // namespace vlmops
