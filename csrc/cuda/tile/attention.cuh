// Attention of a tile of query rows of one head, each warp with 16 or 32 of them (FlashAttention-2, Dao 2023). For
// sm_80 and newer: mma.sync, cp.async.
//
// Keys and values come through one ring of Stages tiles, K V K V ..., with one barrier for each: while a tile is worked
// on, the next Stages - 1 are on their way.
//
// What an op brings is a View: which key tiles its block walks over, and which of their keys a row sees.
//   first, end       positions walked: [first, end)
//   next(at)         the tile's position behind the one at `at`, in [at + Keys, ...)
//   keys(values, at)    address of the key (or value) at a position
//   stride(values, at)  elements to the one behind it
//   count(at)        keys that may be read from there on; the rest of a tile is zeros, and must be masked
//   seen(at)         whether a row of this warp sees a key of the tile; the warp leaves it out otherwise
//   full(at)         whether all of this warp's rows see all of the tile
//   mask(s, a, at)   makes the scores that must not count -infinity: of atom a, rows 16 a + lane / 4 and + 8 of the
//                    warp, keys at + 8 j + lane % 4 * 2 and the one behind it
// Positions are the same in a block, and seen and full in a warp.
#pragma once

#include "../mma/sm80.cuh"
#include "../ptx/math.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/platform.cuh"
#include "../ptx/types.cuh"
#include "../ptx/warp.cuh"
#include "copy.cuh"
#include "fragments.cuh"
#include "softmax.cuh"
#include "swizzled.cuh"

namespace vlmops {

// Keys and values of one key head, from a first token on.
template <class T>
struct KeySource {
  const T *k, *v;
  int64_t k_stride, v_stride;

  VLMOPS_DEVICE_MEMBER const T* at(bool values, int key) const { return (values ? v : k) + key * stride(values); }
  VLMOPS_DEVICE_MEMBER int64_t stride(bool values) const { return values ? v_stride : k_stride; }
};

// Scores are scale * q k^T for exp2: `scale` has a factor log2(e). Capped: cap tanh(. / cap); then `scale` is that
// times 2 / cap, and `cap` has the factor.
template <bool Capped>
struct Scores {
  float scale, cap;

  VLMOPS_DEVICE_MEMBER float factor() const { return Capped ? 1.f : scale; }  // what is left to multiply by
  template <int Tiles>
  VLMOPS_DEVICE_MEMBER void apply(float (&s)[Tiles][4]) const {
    if constexpr (Capped) {  // from 1 - 2 / (1 + exp(2 x / cap))
      VLMOPS_UNROLL
      for (int j = 0; j < Tiles; ++j) {
        VLMOPS_UNROLL
        for (int i = 0; i < 4; ++i) s[j][i] = fma(reciprocal_fast(1.f + exp2_fast(s[j][i] * scale)), -2.f * cap, cap);
      }
    }
  }
};

// The share of part `part` of `parts` in positions [first, end): whole tiles, except at the end.
template <int Keys>
VLMOPS_DEVICE void take_share(int& first, int& end, int part, int parts) {
  const int share = ceil_div(ceil_div(max_of(end - first, 0), Keys), parts) * Keys;
  first = min_of(end, first + part * share);
  end = min_of(end, first + share);
}

// What a kernel writes: T, or with parts of the keys in several blocks float, for attention_combine.cu.
template <class T, bool Split>
struct OutputOf {
  using type = T;
};
template <class T>
struct OutputOf<T, true> {
  using type = float;
};

template <int Tiles>
VLMOPS_DEVICE void clear_tiles(float (&c)[Tiles][4]) {
  VLMOPS_UNROLL
  for (int j = 0; j < Tiles; ++j) {
    VLMOPS_UNROLL
    for (int i = 0; i < 4; ++i) c[j][i] = 0.f;
  }
}

// Atoms: times 16 rows of a warp. Keys: of a tile. Stages: tiles of the ring.
template <class T, int Dim, int Atoms, int Keys, int Stages, int Threads>
struct Attention {
  static constexpr int kWarpRows = 16 * Atoms, kRows = Threads / kWarp * kWarpRows;
  static constexpr int kChunks = Dim / 8, kSteps = (kChunks + 1) / 2;  // of a head: 16-byte chunks, steps of mma
  static constexpr int kTiles = Keys / 8;                              // 8-wide accumulators of scores
  static constexpr bool kHoldQ = Atoms * kSteps * 4 <= 32;             // queries stay in registers
  static constexpr int kShared = (kRows + Stages * Keys) * Dim;        // elements of T
  static_assert(Dim % 8 == 0 && Keys % 16 == 0 && Stages >= 2, "");

  using Tile = SwizzledTile<T, kChunks>;

  T* shared;  // kShared elements, 128-byte aligned
  float acc[Atoms][kChunks][4];
  RowState state[Atoms];

  VLMOPS_DEVICE_MEMBER static int warp_row() { return warp_id() * kWarpRows; }

  // Takes in all keys of a view, for the rows at `q` (stride elements apart, `rows` of them); scores.scale > 0.
  template <class View, bool Capped>
  VLMOPS_DEVICE_MEMBER void run(const T* q, int64_t q_stride, int rows, const View& view,
                                const Scores<Capped>& scores) {
    const Tile q_tile{shared};
    const auto ring = [&](int stage) { return Tile{shared + (kRows + stage * Keys) * Dim}; };
    int ahead = view.first, filled = 0;
    bool values = false;  // whether V is the next to come
    const auto copy_next = [&] {
      if (ahead < view.end) {
        copy_rows_async<Keys, Threads>(ring(filled), view.keys(values, ahead), view.stride(values, ahead),
                                       view.count(ahead));
      }
      cp_async_commit();
      if (values) ahead = view.next(ahead);
      values = !values;
      filled = filled + 1 == Stages ? 0 : filled + 1;
    };
    int used = 0;
    const auto await_tile = [&] {  // returns a ring tile that has arrived, and starts the copy into the one before it
      cp_async_wait_group<Stages - 2>();
      __syncthreads();
      copy_next();
      const Tile found = ring(used);
      used = used + 1 == Stages ? 0 : used + 1;
      return found;
    };

    VLMOPS_UNROLL
    for (int a = 0; a < Atoms; ++a) {
      state[a].clear();
      clear_tiles(acc[a]);
    }
    if (view.first < view.end) {
      copy_rows_async<kRows, Threads>(q_tile, q, q_stride, rows);
      VLMOPS_UNROLL
      for (int stage = 0; stage < Stages - 1; ++stage) copy_next();
    }
    uint32_t held[kHoldQ ? Atoms : 1][kHoldQ ? kSteps : 1][4];

    VLMOPS_UNROLL_N(1)
    for (int at = view.first; at < view.end; at = view.next(at)) {
      const bool seen = view.seen(at);
      const Tile k_tile = await_tile();
      int lane = fresh_lane();
      if constexpr (kHoldQ) {
        if (at == view.first && warp_row() < rows) {
          VLMOPS_UNROLL
          for (int a = 0; a < Atoms; ++a) {
            VLMOPS_UNROLL
            for (int step = 0; step < kSteps; ++step) load_a(held[a][step], q_tile, warp_row() + 16 * a, step, lane);
          }
        }
      }
      uint32_t weights[Atoms][Keys / 16][4];
      if (seen) {
        float s[Atoms][kTiles][4];
        VLMOPS_UNROLL
        for (int a = 0; a < Atoms; ++a) clear_tiles(s[a]);
        VLMOPS_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          uint32_t qs[kHoldQ ? 1 : Atoms][4];
          if constexpr (!kHoldQ) {
            VLMOPS_UNROLL
            for (int a = 0; a < Atoms; ++a) load_a(qs[a], q_tile, warp_row() + 16 * a, step, lane);
          }
          VLMOPS_UNROLL
          for (int j = 0; j < kTiles; j += 2) {
            uint32_t ks[2][2];
            load_b(ks, k_tile, 8 * j, step, lane);
            VLMOPS_UNROLL
            for (int a = 0; a < Atoms; ++a) {
              VLMOPS_UNROLL
              for (int i = 0; i < 2; ++i) {
                if constexpr (kHoldQ) {
                  mma_m16n8k16<T>(s[a][j + i], held[a][step], ks[i][0], ks[i][1]);
                } else {
                  mma_m16n8k16<T>(s[a][j + i], qs[a], ks[i][0], ks[i][1]);
                }
              }
            }
          }
        }
        const bool full = view.full(at);
        VLMOPS_UNROLL
        for (int a = 0; a < Atoms; ++a) {
          scores.apply(s[a]);
          if (!full) view.mask(s[a], a, at);
          take_scores(s[a], acc[a], state[a], scores.factor());
          VLMOPS_UNROLL
          for (int step = 0; step < Keys / 16; ++step) weights_as_a<T>(weights[a][step], s[a], step);
        }
      }
      const Tile v_tile = await_tile();
      if (!seen) continue;
      lane = fresh_lane();
      VLMOPS_UNROLL
      for (int step = 0; step < Keys / 16; ++step) {
        VLMOPS_UNROLL
        for (int chunk = 0; chunk < kChunks; chunk += 2) {
          uint32_t vs[2][2];
          load_b_trans(vs, v_tile, 16 * step, chunk, lane);
          VLMOPS_UNROLL
          for (int a = 0; a < Atoms; ++a) {
            mma_m16n8k16<T>(acc[a][chunk], weights[a][step], vs[0][0], vs[0][1]);
            if (chunk + 1 < kChunks) mma_m16n8k16<T>(acc[a][chunk + 1], weights[a][step], vs[1][0], vs[1][1]);
          }
        }
      }
    }
  }

  // Writes the block's `rows` rows, stride elements apart, and their lse. As T they pass through the warp's own rows of
  // the query tile, which nobody reads any more; as float they go where they belong, and a row that saw no key only
  // says so in its lse.
  template <class Out>
  VLMOPS_DEVICE_MEMBER void write(Out* out, int64_t stride, float* lse, int rows, float factor) {
    constexpr bool kFloat = sizeof(Out) == 4;
    const Tile q_tile{shared};
    const int count = rows - warp_row();  // rows of this warp, or more
    if (count <= 0) return;
    out += warp_row() * stride;
    VLMOPS_UNROLL
    for (int a = 0; a < Atoms; ++a) {
      float row_lse[2];
      finish_rows(acc[a], row_lse, state[a], factor);
      VLMOPS_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int eight = 16 * a + 8 * r, row = eight + lane_id() / 4, pair = lane_id() % 4 * 2;
        VLMOPS_UNROLL
        for (int j = 0; j < kChunks; ++j) {
          if constexpr (kFloat) {
            if (row < count && row_lse[r] != -kInfinity) {
              store_vec<2>(out + row * stride + 8 * j + pair, Vec<float, 2>{acc[a][j][2 * r], acc[a][j][2 * r + 1]});
            }
          } else {
            store_pair(q_tile.at(warp_row() + eight, lane_id() / 4, j) + pair,
                       pack2<T>(acc[a][j][2 * r], acc[a][j][2 * r + 1]));
          }
        }
        if (pair == 0 && row < count) lse[warp_row() + row] = row_lse[r];
      }
    }
    if constexpr (!kFloat) {
      __syncwarp();
      store_rows<kWarpRows>(out, stride, q_tile, warp_row(), count);
    }
  }
};

}  // namespace vlmops
