// Gradients of attention for a tile of one side (query rows, or keys), against tiles of the other side that pass by in
// a ring of two: dQ of rows against keys, dK and dV of keys against rows. Scores come again from the log-sum-exp
// (FlashAttention-2, Dao 2023); a tile has one owner, so there are no atomics. For sm_80 and newer: mma.sync, cp.async.
//
// Both are two products of what the block owns and what passes, s = q k^T and dp = dout v^T (transposed for keys: no
// accumulator is turned), then p = exp2(s - lse), ds = p (dp - delta), and
//   rows: dq += ds k            keys: dk += ds^T q, dv += p^T dout
//
// What an op brings is a View: which tiles pass, and which pairs count.
//   begin(), more(at), next(at)  positions walked
//   rows(second, at)             first passing row of q and dout (keys) or of k and v (rows)
//   stride(second, at)           elements to the one behind it
//   count(at)                    those that may be read; the rest of a tile is zeros
//   stats(at)                    keys: of the passing rows, as attention_stats.cu writes them
//   start(stage, at)             starts copying what the masks need
//   seen(at, stage)              whether any pair of this warp counts; the warp leaves the tile out otherwise
//   full(at, stage)              whether all do
//   mask(s, a, at, stage, part)  makes the scores that must not count -infinity: of atom a, rows 16 a + lane / 4 and +
//   8
//                                of the warp, passing part + 8 j + lane % 4 * 2 and the one behind it
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

// A tile that passes: where it starts, and of which query head of the group.
struct Passing {
  int at, head;
};

// Scores are scale * q k^T for exp2 with a factor log2(e) in `scale`. Capped: cap tanh(. / cap); then `scale` is that
// times 2 / cap, and `cap` has the factor.
template <bool Capped>
struct ScoreSlopes {
  float scale, cap;

  // The score, and its derivative by the score before the cap.
  VLMOPS_DEVICE_MEMBER float score(float raw, float& slope) const {
    if constexpr (Capped) {  // tanh = 1 - 2 / (1 + exp(2 x))
      const float share = reciprocal_fast(1.f + exp2_fast(raw * scale));
      slope = 4.f * share * (1.f - share);
      return fma(share, -2.f * cap, cap);
    } else {
      slope = 1.f;
      return raw * scale;
    }
  }
};

// Atoms: times 16 of a warp's own. Others: of a passing tile, Step of them in registers at once. OfKeys: the block owns
// keys, rows pass.
template <class T, int Dim, int Atoms, int Others, int Step, int Threads, bool OfKeys>
struct AttentionGradient {
  static constexpr int kWarpOwn = 16 * Atoms, kOwn = Threads / kWarp * kWarpOwn;
  static constexpr int kChunks = Dim / 8, kSteps = (kChunks + 1) / 2;  // of a head: 16-byte chunks, steps of mma
  static constexpr int kTiles = Step / 8;                              // 8-wide accumulators of scores
  static constexpr int kTileElements = 2 * (kOwn + 2 * Others) * Dim;  // of T, in shared memory
  static constexpr int kShared = kTileElements + (OfKeys ? 2 * Others * 4 : 0);  // and {lse, delta} of passing rows
  static_assert(Dim % 8 == 0 && Step % 16 == 0 && Others % Step == 0 && Others <= Threads, "");

  using Tile = SwizzledTile<T, kChunks>;

  T* shared;                                                  // kShared elements, 128-byte aligned
  float first[Atoms][kChunks][4];                             // dq, or dk
  float second[OfKeys ? Atoms : 1][OfKeys ? kChunks : 1][4];  // dv
  float row_lse[OfKeys ? 1 : Atoms][2], row_delta[OfKeys ? 1 : Atoms][2];

  VLMOPS_DEVICE_MEMBER static int warp_own() { return warp_id() * kWarpOwn; }
  VLMOPS_DEVICE_MEMBER Tile own(int which) const { return Tile{shared + which * kOwn * Dim}; }
  VLMOPS_DEVICE_MEMBER Tile passing(int stage, int which) const {
    return Tile{shared + (2 * kOwn + (2 * stage + which) * Others) * Dim};
  }
  VLMOPS_DEVICE_MEMBER float* passing_stats(int stage) const {
    return reinterpret_cast<float*>(shared + kTileElements) + stage * Others * 2;
  }

  // products [Atoms * 16, Step] = own(which) passing(stage, which)^T, of those from `part` on.
  VLMOPS_DEVICE_MEMBER void multiply(float (&products)[Atoms][kTiles][4], int stage, int which, int part) const {
    const Tile mine = own(which), theirs = passing(stage, which);
    const int lane = fresh_lane();
    VLMOPS_UNROLL
    for (int a = 0; a < Atoms; ++a) {
      VLMOPS_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        VLMOPS_UNROLL
        for (int i = 0; i < 4; ++i) products[a][j][i] = 0.f;
      }
    }
    VLMOPS_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t as[Atoms][4];
      VLMOPS_UNROLL
      for (int a = 0; a < Atoms; ++a) load_a(as[a], mine, warp_own() + 16 * a, step, lane);
      VLMOPS_UNROLL
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t bs[2][2];
        load_b(bs, theirs, part + 8 * j, step, lane);
        VLMOPS_UNROLL
        for (int a = 0; a < Atoms; ++a) {
          mma_m16n8k16<T>(products[a][j], as[a], bs[0][0], bs[0][1]);
          mma_m16n8k16<T>(products[a][j + 1], as[a], bs[1][0], bs[1][1]);
        }
      }
    }
  }

  // acc += weights passing(stage, which).
  VLMOPS_DEVICE_MEMBER void add(float (&acc)[Atoms][kChunks][4], const uint32_t (&weights)[Atoms][Step / 16][4],
                                int stage, int which, int part) const {
    const Tile theirs = passing(stage, which);
    const int lane = fresh_lane();
    VLMOPS_UNROLL
    for (int step = 0; step < Step / 16; ++step) {
      VLMOPS_UNROLL
      for (int chunk = 0; chunk < kChunks; chunk += 2) {
        uint32_t bs[2][2];
        load_b_trans(bs, theirs, part + 16 * step, chunk, lane);
        VLMOPS_UNROLL
        for (int a = 0; a < Atoms; ++a) {
          mma_m16n8k16<T>(acc[a][chunk], weights[a][step], bs[0][0], bs[0][1]);
          if (chunk + 1 < kChunks) mma_m16n8k16<T>(acc[a][chunk + 1], weights[a][step], bs[1][0], bs[1][1]);
        }
      }
    }
  }

  template <class View>
  VLMOPS_DEVICE_MEMBER void copy(const View& view, int stage, Passing at) const {
    const int count = view.count(at);
    VLMOPS_UNROLL
    for (int which = 0; which < 2; ++which) {
      copy_rows_async<Others, Threads>(passing(stage, which), view.rows(which != 0, at), view.stride(which != 0, at),
                                       count);
    }
    if constexpr (OfKeys) {
      const int row = static_cast<int>(threadIdx.x);
      const float* const stats = view.stats(at);
      if (row < Others) cp_async<8>(passing_stats(stage) + 2 * row, stats + (row < count ? 2 * row : 0), row < count);
    }
    view.start(stage, at);
  }

  // Takes in all tiles of a view. q and dout, or k and v: where the block's own begin, `count` of them; own_stats: of
  // own rows.
  template <class View, bool Capped>
  VLMOPS_DEVICE_MEMBER void run(const T* own0, const T* own1, int64_t stride0, int64_t stride1, int count,
                                const float* own_stats, const View& view, const ScoreSlopes<Capped>& scores) {
    VLMOPS_UNROLL
    for (int a = 0; a < Atoms; ++a) {
      VLMOPS_UNROLL
      for (int j = 0; j < kChunks; ++j) {
        VLMOPS_UNROLL
        for (int i = 0; i < 4; ++i) {
          first[a][j][i] = 0.f;
          if constexpr (OfKeys) second[a][j][i] = 0.f;
        }
      }
    }
    Passing at = view.begin();
    if (!view.more(at)) return;
    copy_rows_async<kOwn, Threads>(own(0), own0, stride0, count);
    copy_rows_async<kOwn, Threads>(own(1), own1, stride1, count);
    copy(view, 0, at);
    cp_async_commit();
    if constexpr (!OfKeys) {
      VLMOPS_UNROLL
      for (int a = 0; a < Atoms; ++a) {
        VLMOPS_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int row = warp_own() + 16 * a + 8 * r + lane_id() / 4;
          row_lse[a][r] = row_delta[a][r] = 0.f;
          if (row < count) {
            const auto pair = load_vec_readonly<2>(own_stats + 2 * row);
            row_lse[a][r] = pair[0];
            row_delta[a][r] = pair[1];
          }
        }
      }
    }
    int stage = 0;
    VLMOPS_UNROLL_N(1)
    while (view.more(at)) {
      cp_async_wait_group<0>();
      __syncthreads();
      const Passing ahead = view.next(at);
      if (view.more(ahead)) copy(view, 1 - stage, ahead);
      cp_async_commit();
      if (view.seen(at, stage)) {
        const bool full = view.full(at, stage);
        VLMOPS_UNROLL_N(1)
        for (int part = 0; part < Others; part += Step) take(view, scores, at, stage, part, full);
      }
      at = ahead;
      stage = 1 - stage;
    }
  }

  template <class View, bool Capped>
  VLMOPS_DEVICE_MEMBER void take(const View& view, const ScoreSlopes<Capped>& scores, Passing at, int stage, int part,
                                 bool full) {
    float s[Atoms][kTiles][4], dp[Atoms][kTiles][4];
    multiply(s, stage, 0, part);
    multiply(dp, stage, 1, part);
    uint32_t weights[OfKeys ? Atoms : 1][Step / 16][4], slopes[Atoms][Step / 16][4];
    VLMOPS_UNROLL
    for (int a = 0; a < Atoms; ++a) {
      float slope[Capped ? kTiles : 1][4];
      VLMOPS_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        VLMOPS_UNROLL
        for (int i = 0; i < 4; ++i) s[a][j][i] = scores.score(s[a][j][i], slope[Capped ? j : 0][i]);
      }
      if (!full) view.mask(s[a], a, at, stage, part);
      VLMOPS_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        float lse[4], delta[4];
        if constexpr (OfKeys) {
          const auto stats = load_vec<4>(passing_stats(stage) + 2 * (part + 8 * j + lane_id() % 4 * 2));
          lse[0] = lse[2] = stats[0];
          delta[0] = delta[2] = stats[1];
          lse[1] = lse[3] = stats[2];
          delta[1] = delta[3] = stats[3];
        } else {
          VLMOPS_UNROLL
          for (int i = 0; i < 4; ++i) {
            lse[i] = row_lse[a][i / 2];
            delta[i] = row_delta[a][i / 2];
          }
        }
        VLMOPS_UNROLL
        for (int i = 0; i < 4; ++i) {
          s[a][j][i] = exp2_fast(s[a][j][i] - lse[i]);
          dp[a][j][i] = s[a][j][i] * (dp[a][j][i] - delta[i]);
          if constexpr (Capped) dp[a][j][i] *= slope[j][i];
        }
      }
      VLMOPS_UNROLL
      for (int step = 0; step < Step / 16; ++step) {
        if constexpr (OfKeys) weights_as_a<T>(weights[a][step], s[a], step);
        weights_as_a<T>(slopes[a][step], dp[a], step);
      }
    }
    if constexpr (OfKeys) add(second, weights, stage, 1, part);
    add(first, slopes, stage, 0, part);
  }

  // Writes the block's `count` results, those of `first` times `scale`; through the warp's own rows of its own tiles,
  // which nobody else reads.
  VLMOPS_DEVICE_MEMBER void write(T* to0, T* to1, int64_t stride, int count, float scale) const {
    const int left = count - warp_own();
    if (left <= 0) return;
    __syncwarp();
    VLMOPS_UNROLL
    for (int which = 0; which < (OfKeys ? 2 : 1); ++which) {
      const float factor = which == 0 ? scale : 1.f;
      VLMOPS_UNROLL
      for (int a = 0; a < Atoms; ++a) {
        VLMOPS_UNROLL
        for (int j = 0; j < kChunks; ++j) {
          const float (&sums)[4] = OfKeys && which == 1 ? second[OfKeys ? a : 0][OfKeys ? j : 0] : first[a][j];
          VLMOPS_UNROLL
          for (int r = 0; r < 2; ++r) {
            store_pair(own(which).at(warp_own() + 16 * a + 8 * r, lane_id() / 4, j) + lane_id() % 4 * 2,
                       pack2<T>(sums[2 * r] * factor, sums[2 * r + 1] * factor));
          }
        }
      }
      __syncwarp();
      store_rows<kWarpOwn>((which == 0 ? to0 : to1) + warp_own() * stride, stride, own(which), warp_own(), left);
    }
  }
};

// Which keys which rows of a sequence see: row i, at key position i + shift, those from left before to right behind it,
// and those before `prefix`.
struct Window {
  int shift, left, right, prefix;

  // Some pair of rows [row0, row1) and keys [key0, key1), both not empty; every pair.
  VLMOPS_DEVICE_MEMBER bool some(int row0, int row1, int key0, int key1) const {
    return key0 < prefix || (key0 < row1 + shift + right && key1 > row0 + shift - left);
  }
  VLMOPS_DEVICE_MEMBER bool every(int row0, int row1, int key0, int key1) const {
    return key1 <= prefix || (key1 <= row0 + shift + right + 1 && key0 >= row1 - 1 + shift - left);
  }

  // Scores of rows row, row + 8 and keys key + 8 j, + 1, of `keys`; or with OfKeys of keys key, key + 8 and rows row +
  // 8 j, + 1: those that do not count become -infinity.
  template <bool OfKeys, int Tiles>
  VLMOPS_DEVICE_MEMBER void mask(float (&s)[Tiles][4], int row, int key, int keys) const {
    const int before = prefix - key, inside = keys - key;
    const uint32_t width = static_cast<uint32_t>(left) + static_cast<uint32_t>(right) + 1u;
    const uint32_t offset = static_cast<uint32_t>(key - row - shift) + static_cast<uint32_t>(left);
    VLMOPS_UNROLL
    for (int j = 0; j < Tiles; ++j) {
      VLMOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int along = 8 * j + i % 2, across = i / 2 * 8;
        const int of_key = OfKeys ? across : along, of_row = OfKeys ? along : across;
        const bool in_window = offset + static_cast<uint32_t>(of_key - of_row) < width;
        if (!(of_key < before || (in_window && (OfKeys || of_key < inside)))) s[j][i] = -kInfinity;
      }
    }
  }
};

}  // namespace vlmops
