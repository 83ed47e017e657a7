// Attention inside packed sequences, backward (tile/attention_backward.cuh): dQ by tiles of query rows, dK and dV by
// tiles of keys of one key head, over the rows of all its query heads.
//
// VLMOPS_T: bf16 or fp16. VLMOPS_D: elements of a head, a multiple of 8. VLMOPS_ATOMS: times 16 rows, or keys, of a
// warp. VLMOPS_OTHERS: keys, or rows, of a tile that passes, VLMOPS_STEP of them at once. VLMOPS_SOFTCAP: whether
// scores are capped.
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/attention_backward.cuh"
#include "tile/segments.cuh"

namespace vlmops {

using T = VLMOPS_T;

#ifdef VLMOPS_ENTRY_varlen_attention_dq
constexpr bool kOfKeys = false;
#else
constexpr bool kOfKeys = true;
#endif
using Block = AttentionGradient<T, VLMOPS_D, VLMOPS_ATOMS, VLMOPS_OTHERS, VLMOPS_STEP, VLMOPS_THREADS, kOfKeys>;
constexpr int kOwn = Block::kOwn, kOthers = VLMOPS_OTHERS;

// The block's tile: `count` from own0 on of one sequence.
struct Task {
  Segment rows, keys;
  int own0, count;
  Window window;
};

// false: nothing to do. Slots are of query rows, or of keys; per_sequence: slots of each sequence, or 0: as
// segments.cuh has them.
VLMOPS_DEVICE bool find_task(Task& task, const int* cu_q, const int* cu_k, const int* prefix_lens, int total_q,
                             int total_k, int n, int per_sequence, int left, int right) {
  const int slot = static_cast<int>(blockIdx.x);
  const int* const cu = kOfKeys ? cu_k : cu_q;
  const int total = kOfKeys ? total_k : total_q;
  const int sequence = per_sequence > 0 ? slot / per_sequence : find_segment<kOwn>(cu, n, total, slot);
  const int tile = per_sequence > 0 ? slot % per_sequence : slot - first_slot<kOwn>(cu, sequence, total);
  task.rows = segment(cu_q, sequence, total_q);
  task.keys = segment(cu_k, sequence, total_k);
  const int length = kOfKeys ? task.keys.length : task.rows.length, tiles = ceil_div(length, kOwn);
  if (tile >= tiles) return false;
  // Under a causal mask the first keys and the last rows have the most to do: they go first.
  task.own0 = (kOfKeys ? tile : tiles - 1 - tile) * kOwn;
  task.count = min_of(length - task.own0, kOwn);
  const int prefix = prefix_lens == nullptr ? 0 : min_of(max_of(prefix_lens[sequence], 0), task.keys.length);
  task.window = {task.keys.length - task.rows.length, left, right, prefix};
  return true;
}

#ifdef VLMOPS_ENTRY_varlen_attention_dq
// Keys pass.
struct View {
  const T *k, *v;
  int64_t k_stride, v_stride;
  Window window;
  int row0, row1;  // of the block
  int length;      // keys
  int first, end, window_begin;

  VLMOPS_DEVICE_MEMBER View(const T* k_, const T* v_, int64_t k_stride_, int64_t v_stride_, const Task& task)
      : k(k_),
        v(v_),
        k_stride(k_stride_),
        v_stride(v_stride_),
        window(task.window),
        row0(task.own0),
        row1(task.own0 + task.count),
        length(task.keys.length),
        first(0),
        end(0),
        window_begin(min_of(max_of(row0 + window.shift - window.left, 0), length)) {
    first = window.prefix > 0 ? 0 : window_begin;
    end = max_of(min_of(max_of(row1 + window.shift + window.right, 0), length), window.prefix);
  }

  VLMOPS_DEVICE_MEMBER Passing begin() const { return {first, 0}; }
  VLMOPS_DEVICE_MEMBER bool more(Passing at) const { return at.at < end; }
  VLMOPS_DEVICE_MEMBER Passing next(Passing at) const {  // leaves out what lies between the prefix and the window
    const int behind = at.at + kOthers;
    return {behind >= window.prefix && behind < window_begin ? window_begin : behind, 0};
  }
  VLMOPS_DEVICE_MEMBER int64_t stride(bool second, Passing) const { return second ? v_stride : k_stride; }
  VLMOPS_DEVICE_MEMBER const T* rows(bool second, Passing at) const {
    return (second ? v : k) + at.at * stride(second, at);
  }
  VLMOPS_DEVICE_MEMBER int count(Passing at) const { return end - at.at; }
  VLMOPS_DEVICE_MEMBER void start(int, Passing) const {}
  VLMOPS_DEVICE_MEMBER int warp_begin() const { return row0 + Block::warp_own(); }
  VLMOPS_DEVICE_MEMBER int warp_end() const { return min_of(warp_begin() + Block::kWarpOwn, row1); }
  VLMOPS_DEVICE_MEMBER bool seen(Passing at, int) const {
    return warp_begin() < row1 && window.some(warp_begin(), warp_end(), at.at, min_of(at.at + kOthers, length));
  }
  VLMOPS_DEVICE_MEMBER bool full(Passing at, int) const {
    return at.at + kOthers <= length && window.every(warp_begin(), warp_end(), at.at, at.at + kOthers);
  }
  VLMOPS_DEVICE_MEMBER void mask(float (&s)[Block::kTiles][4], int atom, Passing at, int, int part) const {
    window.mask<false>(s, warp_begin() + 16 * atom + lane_id() / 4, at.at + part + lane_id() % 4 * 2, length);
  }
};

// dq [total_q, heads, D]; q, dout [total_q, heads, D], k and v [total_k, heads / group, D] with any token and head
// strides; stats [heads, total_q, 2]. Grid: (slots, heads). prefix_lens [n] or null; left and right: at most 2^30,
// which is no bound. score_scale, cap: as ScoreSlopes has them.
VLMOPS_KERNEL(varlen_attention_dq)
(const T* q, const T* k, const T* v, const T* dout, const float* stats, T* dq, const int* cu_q, const int* cu_k,
 const int* prefix_lens, int64_t q_stride, int64_t q_head, int64_t k_stride, int64_t k_head, int64_t v_stride,
 int64_t v_head, int64_t dout_stride, int64_t dout_head, int total_q, int total_k, int n, int group, int per_sequence,
 int left, int right, float scale, float score_scale, float cap) {
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  const int head = static_cast<int>(blockIdx.y);
  Task task;
  if (!find_task(task, cu_q, cu_k, prefix_lens, total_q, total_k, n, per_sequence, left, right)) return;
  const int64_t token = task.rows.start + task.own0, key0 = task.keys.start;
  const View view(k + key0 * k_stride + head / group * k_head, v + key0 * v_stride + head / group * v_head, k_stride,
                  v_stride, task);
  Block block;
  block.shared = dynamic;
  block.run(q + token * q_stride + head * q_head, dout + token * dout_stride + head * dout_head, q_stride, dout_stride,
            task.count, stats + 2 * (static_cast<int64_t>(head) * total_q + token), view,
            ScoreSlopes<VLMOPS_SOFTCAP>{score_scale, cap});
  const int64_t stride = static_cast<int64_t>(gridDim.y) * VLMOPS_D;
  block.write(dq + token * stride + static_cast<int64_t>(head) * VLMOPS_D, nullptr, stride, task.count, scale);
}
#else
// Query rows pass, of one head of the group after the other.
struct View {
  const T *q, *dout;    // at row 0 of the sequence and head 0 of the group
  const float* of_row;  // stats, there too
  int64_t q_stride, q_head, dout_stride, dout_head, stats_head;
  Window window;
  int key0, key1;  // of the block
  int first, end;  // rows
  int group;

  VLMOPS_DEVICE_MEMBER Passing begin() const { return {first, first < end ? 0 : group}; }
  VLMOPS_DEVICE_MEMBER bool more(Passing at) const { return at.head < group; }
  VLMOPS_DEVICE_MEMBER Passing next(Passing at) const {
    return at.at + kOthers < end ? Passing{at.at + kOthers, at.head} : Passing{first, at.head + 1};
  }
  VLMOPS_DEVICE_MEMBER int64_t stride(bool second, Passing) const { return second ? dout_stride : q_stride; }
  VLMOPS_DEVICE_MEMBER const T* rows(bool second, Passing at) const {
    return (second ? dout : q) + at.at * stride(second, at) + at.head * (second ? dout_head : q_head);
  }
  VLMOPS_DEVICE_MEMBER const float* stats(Passing at) const {
    return of_row + 2 * static_cast<int64_t>(at.at) + at.head * stats_head;
  }
  VLMOPS_DEVICE_MEMBER int count(Passing at) const { return end - at.at; }
  VLMOPS_DEVICE_MEMBER void start(int, Passing) const {}
  VLMOPS_DEVICE_MEMBER int warp_begin() const { return key0 + Block::warp_own(); }
  VLMOPS_DEVICE_MEMBER int warp_end() const { return min_of(warp_begin() + Block::kWarpOwn, key1); }
  VLMOPS_DEVICE_MEMBER int row_end(Passing at) const { return min_of(at.at + kOthers, end); }
  VLMOPS_DEVICE_MEMBER bool seen(Passing at, int) const {
    return warp_begin() < key1 && window.some(at.at, row_end(at), warp_begin(), warp_end());
  }
  VLMOPS_DEVICE_MEMBER bool full(Passing at, int) const {  // a row that is not there has zeros, and adds them
    return window.every(at.at, row_end(at), warp_begin(), warp_end());
  }
  VLMOPS_DEVICE_MEMBER void mask(float (&s)[Block::kTiles][4], int atom, Passing at, int, int part) const {
    window.mask<true>(s, at.at + part + lane_id() % 4 * 2, warp_begin() + 16 * atom + lane_id() / 4, key1);
  }
};

// dk, dv [total_k, heads / group, D]; the rest as above. Grid: (slots of keys, heads / group).
VLMOPS_KERNEL(varlen_attention_dkdv)
(const T* q, const T* k, const T* v, const T* dout, const float* stats, T* dk, T* dv, const int* cu_q, const int* cu_k,
 const int* prefix_lens, int64_t q_stride, int64_t q_head, int64_t k_stride, int64_t k_head, int64_t v_stride,
 int64_t v_head, int64_t dout_stride, int64_t dout_head, int total_q, int total_k, int n, int group, int per_sequence,
 int left, int right, float scale, float score_scale, float cap) {
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  const int kv_head = static_cast<int>(blockIdx.y);
  Task task;
  if (!find_task(task, cu_q, cu_k, prefix_lens, total_q, total_k, n, per_sequence, left, right)) return;
  const int64_t row0 = task.rows.start, token = task.keys.start + task.own0,
                head = kv_head * static_cast<int64_t>(group);
  const int key1 = task.own0 + task.count, rows = task.rows.length;
  int first = 0, end = rows;
  if (task.own0 >= task.window.prefix) {  // the rows whose window meets the tile
    first = min_of(max_of(task.own0 - task.window.shift - right, 0), rows);
    end = min_of(max_of(key1 - task.window.shift + left, first), rows);
  }
  const View view{q + row0 * q_stride + head * q_head,
                  dout + row0 * dout_stride + head * dout_head,
                  stats + 2 * (head * total_q + row0),
                  q_stride,
                  q_head,
                  dout_stride,
                  dout_head,
                  2 * static_cast<int64_t>(total_q),
                  task.window,
                  task.own0,
                  key1,
                  first,
                  end,
                  group};
  Block block;
  block.shared = dynamic;
  block.run(k + token * k_stride + kv_head * k_head, v + token * v_stride + kv_head * v_head, k_stride, v_stride,
            task.count, nullptr, view, ScoreSlopes<VLMOPS_SOFTCAP>{score_scale, cap});
  const int64_t stride = static_cast<int64_t>(gridDim.y) * VLMOPS_D;
  const int64_t offset = token * stride + static_cast<int64_t>(kv_head) * VLMOPS_D;
  block.write(dk + offset, dv + offset, stride, task.count, scale);
}
#endif

}  // namespace vlmops
