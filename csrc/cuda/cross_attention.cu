// Attention where every query row has its own run of keys, forward: a block has a tile of rows of one head, and walks
// over the keys some row sees (tile/attention.cuh).
//
// VLMOPS_T: bf16 or fp16. VLMOPS_D: elements of a head, a multiple of 8. VLMOPS_ATOMS: times 16 query rows of a warp.
// VLMOPS_BN: keys of a tile. VLMOPS_STAGES: tiles of the ring. VLMOPS_SPLIT: whether several blocks share the keys.
// VLMOPS_RANGE: whether a row names a range of segments, not one.
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/attention.cuh"
#include "tile/segments.cuh"

namespace vlmops {

using T = VLMOPS_T;
using Block = Attention<T, VLMOPS_D, VLMOPS_ATOMS, VLMOPS_BN, VLMOPS_STAGES, VLMOPS_THREADS>;
using Out = OutputOf<T, VLMOPS_SPLIT>::type;

constexpr int kKeys = VLMOPS_BN, kRows = Block::kRows;

// Keys [begin, end); [0, 0) where there are none.
struct alignas(8) Run {
  int begin, end;
};

// What a row sees, clamped to the tensors. media: the row's segment (-1: none), or its first and the one behind its
// last.
VLMOPS_DEVICE Run run_of(const int* media, const int* cu, int segments, int total) {
  int first = media[0], last = 0;
  if constexpr (VLMOPS_RANGE) {
    first = min_of(max_of(first, 0), segments);
    last = min_of(max_of(media[1], 0), segments);
  } else {
    last = min_of(max_of(first, -1), segments - 1) + 1;
    first = max_of(last - 1, 0);
  }
  if (first >= last) return {0, 0};
  return {segment_start(cu, first, total), segment_start(cu, last, total)};
}

struct View {
  KeySource<T> source;
  const Run* runs;  // [kRows], in shared memory
  Run mine;         // of the row of the warp with this lane's number
  bool work;        // whether the warp has rows
  int first, end;

  VLMOPS_DEVICE_MEMBER static Run load(const Run* run) {
    const auto pair = load_vec<2>(&run->begin);
    return {pair[0], pair[1]};
  }
  // The first position from `at` on that some row sees, or `end`.
  VLMOPS_DEVICE_MEMBER int from(int at) const {
    int found = end;
    VLMOPS_UNROLL
    for (int i = 0; i < kRows; i += kWarp) {
      const Run run = load(runs + i + lane_id());
      if (at < run.end) found = min_of(found, max_of(run.begin, at));
    }
    return warp_any(found == at) ? at : -warp_max<kWarp>(-found);
  }
  VLMOPS_DEVICE_MEMBER int next(int at) const { return from(at + kKeys); }
  VLMOPS_DEVICE_MEMBER const T* keys(bool values, int at) const { return source.at(values, at); }
  VLMOPS_DEVICE_MEMBER int64_t stride(bool values, int) const { return source.stride(values); }
  VLMOPS_DEVICE_MEMBER int count(int at) const { return end - at; }
  VLMOPS_DEVICE_MEMBER bool seen(int at) const { return warp_any(work && at < mine.end && mine.begin < at + kKeys); }
  VLMOPS_DEVICE_MEMBER bool full(int at) const { return warp_all(mine.begin <= at && at + kKeys <= mine.end); }
  VLMOPS_DEVICE_MEMBER void mask(float (&s)[Block::kTiles][4], int atom, int at) const {
    VLMOPS_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Run run = load(runs + Block::warp_row() + 16 * atom + 8 * r + lane_id() / 4);
      const uint32_t offset = static_cast<uint32_t>(at + lane_id() % 4 * 2 - run.begin);
      const uint32_t width = static_cast<uint32_t>(run.end - run.begin);
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

// out [total_q, heads, D], lse [heads, total_q], with SPLIT one of each for each part; q [total_q, heads, D], k and v
// [total_k, heads / group, D] with any token and head strides. cu [segments + 1]: where each segment of keys starts.
// media [total_q], or with RANGE [total_q, 2]. Grid: (tiles of rows, heads, parts). scale: as Scores has it.
VLMOPS_KERNEL(cross_attention_forward)
(const T* q, const T* k, const T* v, Out* out, float* lse, const int* cu, const int* media, int64_t q_stride,
 int64_t q_head, int64_t k_stride, int64_t k_head, int64_t v_stride, int64_t v_head, int total_q, int total_k,
 int segments, int group, float scale) {
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  static_assert(kRows <= VLMOPS_THREADS, "a thread for each row");
  const int head = static_cast<int>(blockIdx.y), heads = static_cast<int>(gridDim.y), thread = threadIdx.x;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = static_cast<int>(min_of(total_q - row0, static_cast<int64_t>(kRows)));
  Run* const runs = reinterpret_cast<Run*>(dynamic + Block::kShared);
  if (thread < kRows) {  // past the last row comes the last again, to change nothing
    const int64_t row = row0 + min_of(thread, rows - 1);
    runs[thread] = run_of(media + (VLMOPS_RANGE ? 2 * row : row), cu, segments, total_k);
  }
  __syncthreads();
  View view{{k + head / group * k_head, v + head / group * v_head, k_stride, v_stride}, runs, {}, false, 0, 0};
  view.work = Block::warp_row() < rows;
  VLMOPS_UNROLL
  for (int i = 0; i < kRows; i += kWarp) view.end = max_of(view.end, View::load(runs + i + lane_id()).end);
  view.end = warp_max<kWarp>(view.end);
  view.first = view.from(0);
  int64_t line = head;
  if constexpr (VLMOPS_SPLIT) {
    const int part = static_cast<int>(blockIdx.z);
    take_share<kKeys>(view.first, view.end, part, static_cast<int>(gridDim.z));
    __syncthreads();
    if (thread < kRows) {
      const Run run{max_of(runs[thread].begin, view.first), min_of(runs[thread].end, view.end)};
      runs[thread] = run.begin < run.end ? run : Run{0, 0};
    }
    __syncthreads();
    view.first = view.from(view.first);
    out += static_cast<int64_t>(part) * total_q * heads * VLMOPS_D;
    line += static_cast<int64_t>(part) * heads;
  }
  view.mine = View::load(runs + Block::warp_row() + lane_id() % Block::kWarpRows);
  Block block;
  block.shared = dynamic;
  const Scores<false> scores{scale, 0.f};
  block.run(q + row0 * q_stride + head * q_head, q_stride, rows, view, scores);
  const int64_t out_stride = static_cast<int64_t>(heads) * VLMOPS_D;
  block.write(out + row0 * out_stride + static_cast<int64_t>(head) * VLMOPS_D, out_stride, lse + line * total_q + row0,
              rows, scores.factor());
}

}  // namespace vlmops
