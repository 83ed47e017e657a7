// Attention where every query row has its own run of keys, backward (tile/attention_backward.cuh): dQ by tiles of rows,
// dK and dV by tiles of keys of one key head, over those tiles of rows that see some of them.
//
// VLMOPS_T: bf16 or fp16. VLMOPS_D: elements of a head, a multiple of 8. VLMOPS_ATOMS: times 16 rows, or keys, of a
// warp. VLMOPS_OTHERS: keys, or rows, of a tile that passes, VLMOPS_STEP of them at once.
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/attention_backward.cuh"

namespace vlmops {

using T = VLMOPS_T;

#ifdef VLMOPS_ENTRY_cross_attention_dq
constexpr bool kOfKeys = false;
#else
constexpr bool kOfKeys = true;
#endif
using Block = AttentionGradient<T, VLMOPS_D, VLMOPS_ATOMS, VLMOPS_OTHERS, VLMOPS_STEP, VLMOPS_THREADS, kOfKeys>;
constexpr int kOwn = Block::kOwn, kOthers = VLMOPS_OTHERS;

// Keys [begin, end); [0, 0) where there are none.
struct Run {
  int begin, end;

  VLMOPS_DEVICE_MEMBER bool meets(int first, int last) const { return begin < last && first < end && begin < end; }
  VLMOPS_DEVICE_MEMBER bool holds(int first, int last) const { return begin <= first && last <= end; }
  // Key `key` seen as its distance from begin, which must be below the width.
  VLMOPS_DEVICE_MEMBER uint32_t offset(int key) const {
    return static_cast<uint32_t>(key) - static_cast<uint32_t>(begin);
  }
  VLMOPS_DEVICE_MEMBER uint32_t width() const {
    return end > begin ? static_cast<uint32_t>(end) - static_cast<uint32_t>(begin) : 0u;
  }
};

VLMOPS_DEVICE Run load_run(const int* runs, int64_t index) {
  const auto pair = load_vec<2>(runs + 2 * index);
  return {pair[0], pair[1]};
}

#ifdef VLMOPS_ENTRY_cross_attention_dq
// Keys pass. The rows' runs lie in shared memory; a row that is not there sees nothing.
struct View {
  const T *k, *v;
  int64_t k_stride, v_stride;
  const int* runs;  // [kOwn, 2]
  Run mine;         // of the row of the warp with this lane's number
  int end;

  // The first position from `at` on that some row sees, or `end`.
  VLMOPS_DEVICE_MEMBER Passing from(int at) const {
    int found = end;
    VLMOPS_UNROLL
    for (int i = 0; i < kOwn; i += kWarp) {
      const Run run = load_run(runs, i + lane_id());
      if (at < run.end && run.begin < run.end) found = min_of(found, max_of(run.begin, at));
    }
    return {-warp_max<kWarp>(-found), 0};
  }
  VLMOPS_DEVICE_MEMBER Passing begin() const { return from(0); }
  VLMOPS_DEVICE_MEMBER bool more(Passing at) const { return at.at < end; }
  VLMOPS_DEVICE_MEMBER Passing next(Passing at) const { return from(at.at + kOthers); }
  VLMOPS_DEVICE_MEMBER int64_t stride(bool second, Passing) const { return second ? v_stride : k_stride; }
  VLMOPS_DEVICE_MEMBER const T* rows(bool second, Passing at) const {
    return (second ? v : k) + at.at * stride(second, at);
  }
  VLMOPS_DEVICE_MEMBER int count(Passing at) const { return end - at.at; }
  VLMOPS_DEVICE_MEMBER void start(int, Passing) const {}
  VLMOPS_DEVICE_MEMBER bool seen(Passing at, int) const { return warp_any(mine.meets(at.at, at.at + kOthers)); }
  VLMOPS_DEVICE_MEMBER bool full(Passing at, int) const { return warp_all(mine.holds(at.at, at.at + kOthers)); }
  VLMOPS_DEVICE_MEMBER void mask(float (&s)[Block::kTiles][4], int atom, Passing at, int, int part) const {
    VLMOPS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Run run = load_run(runs, Block::warp_own() + 16 * atom + 8 * r + lane_id() / 4);
      const uint32_t offset = run.offset(at.at + part + lane_id() % 4 * 2), width = run.width();
      VLMOPS_UNROLL
      for (int j = 0; j < Block::kTiles; ++j) {
        VLMOPS_UNROLL
        for (int i = 0; i < 2; ++i) {
          if (offset + static_cast<uint32_t>(8 * j + i) >= width) s[j][2 * r + i] = -kInfinity;
        }
      }
    }
  }
};

// dq [total_q, heads, D]; q, dout [total_q, heads, D], k and v [total_k, heads / group, D] with any token and head
// strides; stats [heads, total_q, 2]. runs [total_q, 2]: the keys a row sees. Grid: (tiles of rows, heads).
// score_scale: as ScoreSlopes has it.
VLMOPS_KERNEL(cross_attention_dq)
(const T* q, const T* k, const T* v, const T* dout, const float* stats, T* dq, const int* runs, int64_t q_stride,
 int64_t q_head, int64_t k_stride, int64_t k_head, int64_t v_stride, int64_t v_head, int64_t dout_stride,
 int64_t dout_head, int total_q, int total_k, int group, float scale, float score_scale) {
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  static_assert(kOwn <= VLMOPS_THREADS, "a thread for each row");
  const int head = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kOwn;
  const int count = static_cast<int>(min_of(total_q - row0, static_cast<int64_t>(kOwn)));
  int* const shared_runs = reinterpret_cast<int*>(dynamic + Block::kShared);
  if (thread < kOwn) {
    Run run{0, 0};
    if (thread < count) run = load_run(runs, row0 + thread);
    run.begin = max_of(run.begin, 0);
    run.end = min_of(run.end, total_k);
    store_vec<2>(shared_runs + 2 * thread, Vec<int, 2>{run.begin, run.end});
  }
  __syncthreads();
  View view{k + head / group * k_head, v + head / group * v_head, k_stride, v_stride, shared_runs, {}, 0};
  VLMOPS_UNROLL
  for (int i = 0; i < kOwn; i += kWarp) {
    const Run run = load_run(shared_runs, i + lane_id());
    if (run.begin < run.end) view.end = max_of(view.end, run.end);
  }
  view.end = warp_max<kWarp>(view.end);
  view.mine = load_run(shared_runs, Block::warp_own() + lane_id() % Block::kWarpOwn);
  Block block;
  block.shared = dynamic;
  block.run(q + row0 * q_stride + head * q_head, dout + row0 * dout_stride + head * dout_head, q_stride, dout_stride,
            count, stats + 2 * (static_cast<int64_t>(head) * total_q + row0), view,
            ScoreSlopes<false>{score_scale, 0.f});
  const int64_t stride = static_cast<int64_t>(gridDim.y) * VLMOPS_D;
  block.write(dq + row0 * stride + static_cast<int64_t>(head) * VLMOPS_D, nullptr, stride, count, scale);
}
#else
// Query rows pass, of one head of the group after the other, in tiles of which the block's keys are seen by some row.
struct View {
  static_assert(kOthers == kWarp, "a lane for each row that passes");

  const T *q, *dout;    // at head 0 of the group
  const float* of_row;  // stats, there too
  const int* runs;      // [total_q, 2]
  const int* hulls;     // [tiles, 2]: from the first to the last key that rows of a tile see
  int* shared_runs;     // [2, kOthers, 2]
  int64_t q_stride, q_head, dout_stride, dout_head;
  int key0, key1;  // of the block
  int total_q, tiles, group;

  VLMOPS_DEVICE_MEMBER Run run_of(int64_t row) const { return row < total_q ? load_run(runs, row) : Run{0, 0}; }
  // The first tile from `tile` on with a row that sees a key of the block, or `tiles`.
  VLMOPS_DEVICE_MEMBER int from(int tile) const {
    for (; tile < tiles; tile += kWarp) {
      Run hull{0, 0};
      if (tile + lane_id() < tiles) hull = load_run(hulls, tile + lane_id());
      const uint32_t candidates = ballot(hull.meets(key0, key1));
      VLMOPS_UNROLL_N(1)
      for (int i = 0; i < kWarp; ++i) {
        if ((candidates >> i & 1u) == 0) continue;
        if (warp_any(run_of(static_cast<int64_t>(tile + i) * kOthers + lane_id()).meets(key0, key1))) return tile + i;
      }
    }
    return tiles;
  }
  VLMOPS_DEVICE_MEMBER Passing begin() const {
    const int tile = from(0);
    return {tile, tile < tiles ? 0 : group};
  }
  VLMOPS_DEVICE_MEMBER bool more(Passing at) const { return at.head < group; }
  VLMOPS_DEVICE_MEMBER Passing next(Passing at) const {  // all heads of a tile, then the next tile
    if (at.head + 1 < group) return {at.at, at.head + 1};
    const int tile = from(at.at + 1);
    return {tile, tile < tiles ? 0 : group};
  }
  VLMOPS_DEVICE_MEMBER int64_t row(Passing at) const { return static_cast<int64_t>(at.at) * kOthers; }
  VLMOPS_DEVICE_MEMBER int64_t stride(bool second, Passing) const { return second ? dout_stride : q_stride; }
  VLMOPS_DEVICE_MEMBER const T* rows(bool second, Passing at) const {
    return (second ? dout : q) + row(at) * stride(second, at) + at.head * (second ? dout_head : q_head);
  }
  VLMOPS_DEVICE_MEMBER const float* stats(Passing at) const {
    return of_row + 2 * (row(at) + at.head * static_cast<int64_t>(total_q));
  }
  VLMOPS_DEVICE_MEMBER int count(Passing at) const {
    return static_cast<int>(min_of(total_q - row(at), static_cast<int64_t>(kOthers)));
  }
  VLMOPS_DEVICE_MEMBER void start(int stage, Passing at) const {
    const int thread = static_cast<int>(threadIdx.x), rows = count(at);
    if (thread < kOthers) {  // a row that is not there sees nothing
      cp_async<8>(shared_runs + 2 * (stage * kOthers + thread), runs + 2 * (row(at) + (thread < rows ? thread : 0)),
                  thread < rows);
    }
  }
  VLMOPS_DEVICE_MEMBER int warp_begin() const { return key0 + Block::warp_own(); }
  VLMOPS_DEVICE_MEMBER int warp_end() const { return min_of(warp_begin() + Block::kWarpOwn, key1); }
  VLMOPS_DEVICE_MEMBER bool seen(Passing, int stage) const {
    return warp_any(load_run(shared_runs, stage * kOthers + lane_id()).meets(warp_begin(), warp_end()));
  }
  VLMOPS_DEVICE_MEMBER bool full(Passing, int stage) const {
    return warp_all(load_run(shared_runs, stage * kOthers + lane_id()).holds(warp_begin(), warp_end()));
  }
  VLMOPS_DEVICE_MEMBER void mask(float (&s)[Block::kTiles][4], int atom, Passing, int stage, int part) const {
    const int key = warp_begin() + 16 * atom + lane_id() / 4;
    VLMOPS_UNROLL
    for (int j = 0; j < Block::kTiles; ++j) {
      const auto pairs = load_vec<4>(shared_runs + 2 * (stage * kOthers + part + 8 * j + lane_id() % 4 * 2));
      VLMOPS_UNROLL
      for (int c = 0; c < 2; ++c) {
        const Run run{pairs[2 * c], pairs[2 * c + 1]};
        VLMOPS_UNROLL
        for (int r = 0; r < 2; ++r) {
          if (run.offset(key + 8 * r) >= run.width()) s[j][2 * r + c] = -kInfinity;
        }
      }
    }
  }
};

// dk, dv [total_k, heads / group, D]; the rest as above. hulls [tiles of kOthers rows, 2]. Grid: (tiles of keys, heads
// / group).
VLMOPS_KERNEL(cross_attention_dkdv)
(const T* q, const T* k, const T* v, const T* dout, const float* stats, T* dk, T* dv, const int* runs, const int* hulls,
 int64_t q_stride, int64_t q_head, int64_t k_stride, int64_t k_head, int64_t v_stride, int64_t v_head,
 int64_t dout_stride, int64_t dout_head, int total_q, int total_k, int group, float scale, float score_scale) {
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  const int kv_head = static_cast<int>(blockIdx.y);
  const int64_t key0 = static_cast<int64_t>(blockIdx.x) * kOwn, head = kv_head * static_cast<int64_t>(group);
  const int count = static_cast<int>(min_of(total_k - key0, static_cast<int64_t>(kOwn)));
  const View view{q + head * q_head,
                  dout + head * dout_head,
                  stats + 2 * head * total_q,
                  runs,
                  hulls,
                  reinterpret_cast<int*>(dynamic + Block::kShared),
                  q_stride,
                  q_head,
                  dout_stride,
                  dout_head,
                  static_cast<int>(key0),
                  static_cast<int>(key0) + count,
                  total_q,
                  ceil_div(total_q, kOthers),
                  group};
  Block block;
  block.shared = dynamic;
  block.run(k + key0 * k_stride + kv_head * k_head, v + key0 * v_stride + kv_head * v_head, k_stride, v_stride, count,
            nullptr, view, ScoreSlopes<false>{score_scale, 0.f});
  const int64_t stride = static_cast<int64_t>(gridDim.y) * VLMOPS_D;
  const int64_t offset = key0 * stride + static_cast<int64_t>(kv_head) * VLMOPS_D;
  block.write(dk + offset, dv + offset, stride, count, scale);
}
#endif

}  // namespace vlmops
