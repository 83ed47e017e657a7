// The first product of an MLP, h [M, H] = act(x Wg^T + bg) * (x W1^T + b1), or act(x W1^T + b1), x [M, K] or read as
// rows of 2 x 2 tokens: by tensor cores, exactly in float, and for few rows as a stream of the weights. (Without a gate
// and a gather it is linear.cu's; so is the second product.)
//
// VLMOPS_T: type of all matrices; VLMOPS_ACT: the activation; VLMOPS_GATED; VLMOPS_GATHER: x is tokens [pictures,
// height, width, K / 4]; VLMOPS_VEC: elements of an access to x and the weights; VLMOPS_OUT: of one to the biases and
// h.
#include "epilogue/output.cuh"
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/blocks.cuh"
#include "tile/gemm.cuh"
#include "tile/gemm_float.cuh"
#include "tile/stream.cuh"

namespace vlmops {

using T = VLMOPS_T;
constexpr Activation kActivation = Activation::VLMOPS_ACT;
constexpr bool kGated = VLMOPS_GATED, kGather = VLMOPS_GATHER;
constexpr int kProducts = kGated ? 2 : 1;

// The operands. Rows of x are `x_stride` elements apart; of tokens, tokens are `x_stride` and pictures `picture` apart.
struct Operands {
  const T *x, *w1, *wg;
  int64_t x_stride, picture, w1_stride, wg_stride;
  int m, n, k;
  int of_picture, of_line;  // blocks of 2 x 2 tokens

  VLMOPS_DEVICE_MEMBER auto rows(int first) const {
    if constexpr (kGather) {
      return BlockRows<T>{x, picture, x_stride, of_picture, of_line, first, m};
    } else {
      return MatrixRows<T, false>{x, x_stride, first, m};
    }
  }
  VLMOPS_DEVICE_MEMBER auto where() const {
    if constexpr (kGather) {
      return BlockColumns{2 * static_cast<int64_t>(of_line) * x_stride, x_stride, k / 4};
    } else {
      return Neighbours{};
    }
  }
  VLMOPS_DEVICE_MEMBER auto columns(int first) const {
    if constexpr (kGated) {
      return PairedRows<T>{wg, w1, wg_stride, w1_stride, first, n};
    } else {
      return MatrixRows<T, true>{w1, w1_stride, first, n};
    }
  }
  // Of one product: the gate's, if there is one, is 0.
  VLMOPS_DEVICE_MEMBER auto rows_of_weight(int product, int first) const {
    const bool gate = kGated && product == 0;
    return MatrixRows<T, false>{gate ? wg : w1, gate ? wg_stride : w1_stride, first, n};
  }
};

// N neighbouring columns of h from their products, the gate's first; Each an access.
template <int Each, int N>
struct Hidden {
  const T *b1, *bg;  // null: none
  T* out;
  int n;
  float bias[kProducts][N];

  VLMOPS_DEVICE_MEMBER Hidden(const T* b1_, const T* bg_, T* out_, int n_) : b1(b1_), bg(bg_), out(out_), n(n_) {}

  VLMOPS_DEVICE_MEMBER void begin(int column) {
    read_terms<Each>(bias[kProducts - 1], b1, column, n - column);
    if constexpr (kGated) read_terms<Each>(bias[0], bg, column, n - column);
  }
  VLMOPS_DEVICE_MEMBER void finish(int64_t row, int column, const float (&products)[kProducts][N]) const {
    float v[N];
    VLMOPS_UNROLL
    for (int i = 0; i < N; ++i) {
      v[i] = activate<kActivation>(products[0][i] + bias[0][i]);
      if constexpr (kGated) v[i] *= products[1][i] + bias[1][i];
    }
    write_columns<Each>(out + row * n + column, v, n - column);
  }
};

#ifdef VLMOPS_ENTRY_mlp_gemm
// A tile of VLMOPS_BM x VLMOPS_BN sums a block, of half as many columns of h where it is gated; VLMOPS_BK along k at a
// time, VLMOPS_STAGES of them under way; a warp has VLMOPS_WM x VLMOPS_WN.
VLMOPS_KERNEL_RESIDENT(mlp_gemm, (VLMOPS_THREADS < 128 ? 4 : 512 / VLMOPS_THREADS))
(const T* x, const T* w1, const T* wg, const T* b1, const T* bg, T* out, int64_t x_stride, int64_t picture,
 int64_t w1_stride, int64_t wg_stride, int m, int n, int k, int of_picture, int of_line) {
  using Gemm = GemmTile<T, VLMOPS_BM, VLMOPS_BN, VLMOPS_BK, VLMOPS_WM, VLMOPS_WN, VLMOPS_STAGES, VLMOPS_VEC>;
  static_assert(Gemm::kThreads == VLMOPS_THREADS, "a warp to each part of the tile");
  constexpr int kColumns = VLMOPS_BN / kProducts;
  VLMOPS_DYNAMIC_SHARED(T, shared);
  int m0, n0;
  grouped<8>(static_cast<int>(blockIdx.x), ceil_div(m, VLMOPS_BM), ceil_div(n, kColumns), m0, n0);
  m0 *= VLMOPS_BM;
  n0 *= kColumns;
  const Operands o{x, w1, wg, x_stride, picture, w1_stride, wg_stride, m, n, k, of_picture, of_line};
  Gemm gemm;
  gemm.run(shared, o.rows(m0), o.where(), o.columns(n0), k);
  Hidden<VLMOPS_OUT, 8> hidden(b1, bg, out, n);
  gemm.template each_of<kProducts>([&](int column) { hidden.begin(n0 + column); },
                                   [&](int row, int column, float (&v)[kProducts][8]) {
                                     if (m0 + row < m) hidden.finish(m0 + row, n0 + column, v);
                                   });
}
#endif

#ifdef VLMOPS_ENTRY_mlp_few_rows
// VLMOPS_ROWS rows, VLMOPS_COLS columns a warp.
VLMOPS_KERNEL(mlp_few_rows)
(const T* x, const T* w1, const T* wg, const T* b1, const T* bg, T* out, int64_t x_stride, int64_t picture,
 int64_t w1_stride, int64_t wg_stride, int m, int n, int k, int of_picture, int of_line) {
  using Stream = StreamedRows<T, VLMOPS_ROWS, VLMOPS_COLS, kProducts, VLMOPS_VEC>;
  const int first = (static_cast<int>(blockIdx.x) * (VLMOPS_THREADS / kWarp) + warp_id()) * VLMOPS_COLS;
  if (first >= n) return;
  const Operands o{x, w1, wg, x_stride, picture, w1_stride, wg_stride, m, n, k, of_picture, of_line};
  Stream stream;
  stream.run(o.rows(0), o.where(), [&](int product) { return o.rows_of_weight(product, 0); }, first, k);
  const int row = Stream::row(), column = first + Stream::column();
  if (row >= VLMOPS_ROWS) return;
  Hidden<1, 1> hidden(b1, bg, out, n);
  hidden.begin(column);
  hidden.finish(row, column, stream.mine);
}
#endif

#ifdef VLMOPS_ENTRY_mlp_gemm_float
VLMOPS_KERNEL_RESIDENT(mlp_gemm_float, 2)
(const T* x, const T* w1, const T* wg, const T* b1, const T* bg, T* out, int64_t x_stride, int64_t picture,
 int64_t w1_stride, int64_t wg_stride, int m, int n, int k, int of_picture, int of_line) {
  using Tile = FloatTile<kProducts, VLMOPS_VEC>;
  static_assert(VLMOPS_THREADS == Tile::kThreads && sizeof(T) == 4, "float");
  __shared__ __align__(16) Tile::Shared shared;
  int m0, n0;
  grouped<8>(static_cast<int>(blockIdx.x), ceil_div(m, Tile::kTile), ceil_div(n, Tile::kTile), m0, n0);
  m0 *= Tile::kTile;
  n0 *= Tile::kTile;
  const Operands o{x, w1, wg, x_stride, picture, w1_stride, wg_stride, m, n, k, of_picture, of_line};
  Tile tile;
  tile.run(shared, o.rows(m0), o.where(), [&](int product) { return o.rows_of_weight(product, n0); }, k);
  Hidden<VLMOPS_OUT, Tile::kEach> hidden(b1, bg, out, n);
  const int column = n0 + Tile::column();
  hidden.begin(column);
  VLMOPS_UNROLL
  for (int i = 0; i < Tile::kEach; ++i) {
    const int row = m0 + Tile::row() + i;
    if (row < m) hidden.finish(row, column, tile.sums[i]);
  }
}
#endif

}  // namespace vlmops
