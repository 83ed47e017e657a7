// Attention inside packed sequences, forward, for sm_90a (after FlashAttention-3, Shah et al. 2024): a producer warp
// brings tiles of keys and values by TMA, two warpgroups have 64 query rows each and multiply by wgmma. Experimental:
// varlen_attention.cu is what other GPUs run, and this one by default.
//
// VLMOPS_T: bf16 or fp16. VLMOPS_D: elements of a head, a multiple of 8 with a wgmma of its own (mma/sm90.cuh).
// VLMOPS_BN: keys of a tile. VLMOPS_STAGES: tiles of keys, and of values, under way. VLMOPS_SOFTCAP: whether scores are
// capped.
#include "mma/sm90.cuh"
#include "ptx/platform.cuh"
#include "ptx/sm90.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/attention.cuh"
#include "tile/segments.cuh"
#include "tile/warpgroup.cuh"

namespace vlmops {

using T = VLMOPS_T;

constexpr int kRows = 128, kKeys = VLMOPS_BN, kDim = VLMOPS_D, kStages = VLMOPS_STAGES;
constexpr int kWide = 64, kAtoms = (kDim + kWide - 1) / kWide;  // elements of a row of 128 bytes; such rows of a head
constexpr int kQueryTile = kAtoms * kRows * kWide, kKeyTile = kAtoms * kKeys * kWide;  // elements
constexpr int kBytes = static_cast<int>(sizeof(T));
constexpr int kTiles = kKeys / 8;

// Query row i sits at key position i + shift; it sees the keys in [i + shift - left, i + shift + right], and those
// before `prefix`.
struct Window {
  int shift, left, right, prefix, length;  // of keys
  int first, begin, end;                   // the rows [row0, row1) see [begin, end), and from `first` on the prefix

  VLMOPS_DEVICE_MEMBER Window(int row0, int row1, int shift_, int left_, int right_, int prefix_, int length_)
      : shift(shift_), left(left_), right(right_), prefix(prefix_), length(length_) {
    begin = begin_of(row0);
    end = end_of(row1);
    first = prefix > 0 ? 0 : begin;
  }
  VLMOPS_DEVICE_MEMBER int begin_of(int row) const { return min_of(max_of(row + shift - left, 0), length); }
  VLMOPS_DEVICE_MEMBER int end_of(int row) const {  // behind what the rows before `row` see
    return max_of(min_of(max_of(row + shift + right, 0), length), prefix);
  }
  VLMOPS_DEVICE_MEMBER int next(int at) const {  // leaves out what lies between the prefix and the window
    at += kKeys;
    return at >= prefix && at < begin ? begin : at;
  }
  // Whether one of the rows [from, to) sees a key of the tile at `at`; whether all see all of it.
  VLMOPS_DEVICE_MEMBER bool seen(int at, int from, int to) const {
    return from < to && at < end_of(to) && (at + kKeys > begin_of(from) || at < prefix);
  }
  VLMOPS_DEVICE_MEMBER bool full(int at, int from, int to) const {
    const int last = max_of(min_of(from + shift + right + 1, length), prefix);
    return (at >= to - 1 + shift - left && at + kKeys <= last) || at + kKeys <= prefix;
  }
  // Scores that do not count become -infinity: of rows `row` and `row` + 8, keys as accumulators have them.
  VLMOPS_DEVICE_MEMBER void mask(float (&s)[kTiles][4], int row, int at) const {
    const int key = at + lane_id() % 4 * 2, before = prefix - key, inside = length - key;
    const uint32_t width = static_cast<uint32_t>(left) + static_cast<uint32_t>(right) + 1u;
    const uint32_t offset =
        static_cast<uint32_t>(key) - static_cast<uint32_t>(row + shift) + static_cast<uint32_t>(left);
    VLMOPS_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      VLMOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int step = 8 * j + i % 2;
        const bool in_window = offset + static_cast<uint32_t>(step - i / 2 * 8) < width;
        if (!(step < before || (in_window && step < inside))) s[j][i] = -kInfinity;
      }
    }
  }
};

struct Shared {
  RingBarriers<kStages> keys, values;
  uint64_t queries;
  uint64_t rest;  // the last tile of values, before what is behind its end is cleared
};

// The producer warp. `row`, `key`: tokens of the tile's first query and of the sequence's first key.
VLMOPS_DEVICE void produce(T* tiles, Shared& shared, const Window& window, const TensorMap& q, const TensorMap& k,
                           const TensorMap& v, int row, int key, int head, int key_head) {
  const bool one = lane_id() == 0;
  if (one) {
    mbarrier_arrive_expect(&shared.queries, kQueryTile * kBytes);
    for (int atom = 0; atom < kAtoms; ++atom) {
      tma_load(tiles + atom * kRows * kWide, q, &shared.queries, atom * kWide, head, row);
    }
  }
  T* const keys = tiles + kQueryTile;
  T* const values = keys + kStages * kKeyTile;
  const auto load = [&](T* tile, const TensorMap& map, uint64_t* full, int at) {
    if (!one) return;
    mbarrier_arrive_expect(full, kKeyTile * kBytes);
    for (int atom = 0; atom < kAtoms; ++atom) {
      tma_load(tile + atom * kKeys * kWide, map, full, atom * kWide, key_head, key + at);
    }
  };
  RingPosition<kStages> ring;
  for (int at = window.first; at < window.end; at = window.next(at), ring.advance()) {
    mbarrier_wait(&shared.keys.empty[ring.stage], ring.parity ^ 1);
    load(keys + ring.stage * kKeyTile, k, &shared.keys.full[ring.stage], at);
    mbarrier_wait(&shared.values.empty[ring.stage], ring.parity ^ 1);
    T* const tile = values + ring.stage * kKeyTile;
    const int count = window.end - at;
    if (count >= kKeys) {
      load(tile, v, &shared.values.full[ring.stage], at);
      continue;
    }
    // What is behind the last key is another sequence's: its weight is zero, and zero times NaN is not.
    load(tile, v, &shared.rest, at);
    mbarrier_wait(&shared.rest, 0);
    constexpr int kChunks = kWide / 8;
    for (int i = count * kChunks + lane_id(); i < kKeys * kChunks; i += kWarp) {
      VLMOPS_UNROLL
      for (int atom = 0; atom < kAtoms; ++atom) {
        Vec<T, 8> zeros;
        VLMOPS_UNROLL
        for (int j = 0; j < 8; ++j) zeros[j] = T{0};
        store_vec<8>(tile + atom * kKeys * kWide + i * 8, zeros);
      }
    }
    fence_async_proxy();
    __syncwarp();
    if (one) mbarrier_arrive(&shared.values.full[ring.stage]);
  }
}

struct Consumer {
  float acc[kDim / 8][4];
  RowState state;

  // The rows [from, to) of the warpgroup (none: from >= to), of which this warp has those from `mine` on.
  template <bool Capped>
  VLMOPS_DEVICE_MEMBER void run(const T* tiles, Shared& shared, const Window& window, int from, int to, int mine,
                                const Scores<Capped>& scores) {
    const T* const q = tiles + (warpgroup_id() - 1) * 64 * kWide;
    const T* const keys = tiles + kQueryTile;
    const T* const values = keys + kStages * kKeyTile;
    state.clear();
    clear_tiles(acc);
    if (window.first < window.end) mbarrier_wait(&shared.queries, 0);
    RingPosition<kStages> ring;
    VLMOPS_UNROLL_N(1)
    for (int at = window.first; at < window.end; at = window.next(at), ring.advance()) {
      const bool seen = window.seen(at, from, to);
      mbarrier_wait(&shared.keys.full[ring.stage], ring.parity);
      uint32_t weights[kKeys / 16][4];
      if (seen) {
        float s[kTiles][4];
        clear_tiles(s);
        const T* const k = keys + ring.stage * kKeyTile;
        wgmma_keep(s);
        wgmma_fence();
        VLMOPS_UNROLL
        for (int step = 0; step < (kDim + 15) / 16; ++step) {
          const int atom = step / 4, inside = step % 4 * 16;
          wgmma<kKeys, T>(s, tile_descriptor(q + atom * kRows * kWide + inside),
                          tile_descriptor(k + atom * kKeys * kWide + inside), true);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(s);
        shared.keys.give_back(ring.stage);
        scores.apply(s);
        if (!window.full(at, mine, min_of(mine + 16, to))) window.mask(s, mine + lane_id() / 4, at);
        take_scores(s, acc, state, scores.factor());
        VLMOPS_UNROLL
        for (int step = 0; step < kKeys / 16; ++step) weights_as_a<T>(weights[step], s, step);
      } else {
        shared.keys.give_back(ring.stage);
      }
      mbarrier_wait(&shared.values.full[ring.stage], ring.parity);
      if (seen) {
        const T* const v = values + ring.stage * kKeyTile;
        wgmma_keep(acc);
        wgmma_fence();
        VLMOPS_UNROLL
        for (int step = 0; step < kKeys / 16; ++step) {
          wgmma<kDim, T, true>(acc, weights[step], tile_descriptor(v + step * 16 * kWide, kKeys * kWide * kBytes),
                               true);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(acc);
      }
      shared.values.give_back(ring.stage);
    }
  }

  // Writes this warp's rows as far as there are `count`: out `stride` elements apart, lse one after the other.
  VLMOPS_DEVICE_MEMBER void write(T* out, int64_t stride, float* lse, int count, float factor) {
    float row_lse[2];
    finish_rows(acc, row_lse, state, factor);
    const int t = lane_id() % 4;
    VLMOPS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = lane_id() / 4 + 8 * half;
      T* const to = out + row * stride;
      VLMOPS_UNROLL
      for (int j = 0; j + 4 <= kDim / 8; j += 4) {
        float v[8];
        VLMOPS_UNROLL
        for (int i = 0; i < 8; ++i) v[i] = acc[j + i / 2][half * 2 + i % 2];
        exchange_pairs(v, t);
        Vec<T, 8> part;
        VLMOPS_UNROLL
        for (int i = 0; i < 8; ++i) part[i] = from_float<T>(v[i]);
        if (row < count) store_vec<8>(to + 8 * (j + t), part);
      }
      VLMOPS_UNROLL
      for (int j = kDim / 32 * 4; j < kDim / 8; ++j) {
        if (row < count) store_pair(to + 8 * j + 2 * t, pack2<T>(acc[j][half * 2], acc[j][half * 2 + 1]));
      }
      if (t == 0 && row < count) lse[row] = row_lse[half];
    }
  }
};

// out [total_q, heads, D], lse [heads, total_q]; q [total_q, heads, D] in boxes of 128 x 1 x 64, k and v [total_k,
// heads / group, D] of VLMOPS_BN x 1 x 64. Grid: (slots, heads). per_sequence, prefix_lens, left, right, scale, cap: as
// in varlen_attention.cu.
VLMOPS_KERNEL(varlen_attention_sm90)
(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, T* out,
 float* lse, const int* cu_q, const int* cu_k, const int* prefix_lens, int total_q, int total_k, int n, int group,
 int per_sequence, int left, int right, float scale, float cap) {
  static_assert(VLMOPS_THREADS == 3 * kWarpgroup, "a producer and two consumers");
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  __shared__ Shared shared;
  T* const tiles = swizzle_aligned(dynamic);
  const int slot = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int heads = static_cast<int>(gridDim.y);
  const int sequence = per_sequence > 0 ? slot / per_sequence : find_segment<kRows>(cu_q, n, total_q, slot);
  const int own = per_sequence > 0 ? slot % per_sequence : slot - first_slot<kRows>(cu_q, sequence, total_q);
  const Segment rows = segment(cu_q, sequence, total_q), keys = segment(cu_k, sequence, total_k);
  const int tile = ceil_div(rows.length, kRows) - 1 - own;  // under a causal mask the last has the most keys
  if (tile < 0) return;
  const int prefix = prefix_lens == nullptr ? 0 : min_of(max_of(prefix_lens[sequence], 0), keys.length);
  const int row0 = tile * kRows, row1 = min_of(row0 + kRows, rows.length);
  const Window window(row0, row1, keys.length - rows.length, left, right, prefix, keys.length);
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.queries, 1);
    mbarrier_init(&shared.rest, 1);
  }
  shared.keys.init(2 * kWarpgroup / kWarp);
  shared.values.init(2 * kWarpgroup / kWarp);
  if (warpgroup_id() == 0) {
    give_registers<40>();
    if (warp_id() == 0 && window.first < window.end) {
      produce(tiles, shared, window, q, k, v, rows.start + row0, keys.start, head, head / group);
    }
    return;
  }
  take_registers<232>();
  const int from = row0 + (warpgroup_id() - 1) * 64, mine = from + warp_id() % 4 * 16;
  const Scores<VLMOPS_SOFTCAP> scores{scale, cap};
  Consumer consumer;
  consumer.run(tiles, shared, window, from, min_of(from + 64, row1), mine, scores);
  const int64_t stride = static_cast<int64_t>(heads) * kDim, token = rows.start + mine;
  consumer.write(out + token * stride + static_cast<int64_t>(head) * kDim, stride,
                 lse + static_cast<int64_t>(head) * total_q + token, row1 - mine, scores.factor());
}

}  // namespace vlmops
