// Attention inside packed sequences, forward: a block has a tile of query rows of one head of one sequence, and walks
// over the keys some row sees (tile/attention.cuh).
//
// VLMOPS_T: bf16 or fp16. VLMOPS_D: elements of a head, a multiple of 8. VLMOPS_ATOMS: times 16 query rows of a warp.
// VLMOPS_BN: keys of a tile. VLMOPS_STAGES: tiles of the ring. VLMOPS_SOFTCAP: whether scores are capped. VLMOPS_SPLIT:
// whether several blocks share the keys.
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

// Query row i sits at key position i + shift; it sees the keys in [i + shift - left, i + shift + right], and those
// before `prefix`. Here: what the rows [first, last) see.
struct Seen {
  int begin;       // first key of anyone's window
  int end;         // behind the last key anyone sees
  int full_begin;  // everyone's window has [full_begin, full_end)
  int full_end;

  VLMOPS_DEVICE_MEMBER Seen(int first, int last, int shift, int left, int right, int prefix, int keys) {
    begin = min_of(max_of(first + shift - left, 0), keys);
    end = max_of(min_of(max_of(last + shift + right, 0), keys), prefix);
    full_begin = last - 1 + shift - left;
    full_end = max_of(min_of(first + shift + right + 1, keys), prefix);
  }
};

// What the rows [row0, row1) of a sequence see of its `length` keys.
struct View {
  KeySource<T> source;
  int length, prefix, left, right;
  int position;  // of the warp's first row
  Seen all, mine;
  int my_end;  // behind the last key of the warp, or 0
  int first, end;

  VLMOPS_DEVICE_MEMBER View(const KeySource<T>& source_, int row0, int row1, int shift, int length_, int prefix_,
                            int left_, int right_)
      : source(source_),
        length(length_),
        prefix(prefix_),
        left(left_),
        right(right_),
        position(row0 + Block::warp_row() + shift),
        all(row0, row1, shift, left_, right_, prefix_, length_),
        mine(row0 + Block::warp_row(), min_of(row0 + Block::warp_row() + Block::kWarpRows, row1), shift, left_, right_,
             prefix_, length_),
        my_end(row0 + Block::warp_row() < row1 ? mine.end : 0),
        first(prefix_ > 0 ? 0 : all.begin),
        end(all.end) {}

  VLMOPS_DEVICE_MEMBER int next(int at) const {  // leaves out what lies between the prefix and the window
    at += kKeys;
    return at >= prefix && at < all.begin ? all.begin : at;
  }
  VLMOPS_DEVICE_MEMBER const T* keys(bool values, int at) const { return source.at(values, at); }
  VLMOPS_DEVICE_MEMBER int64_t stride(bool values, int) const { return source.stride(values); }
  VLMOPS_DEVICE_MEMBER int count(int at) const { return end - at; }
  VLMOPS_DEVICE_MEMBER bool seen(int at) const { return at < my_end && (at + kKeys > mine.begin || at < prefix); }
  VLMOPS_DEVICE_MEMBER bool full(int at) const {
    return (at >= mine.full_begin && at + kKeys <= mine.full_end) || at + kKeys <= prefix;
  }
  VLMOPS_DEVICE_MEMBER void mask(float (&s)[Block::kTiles][4], int atom, int at) const {
    const int key = at + lane_id() % 4 * 2, row = position + 16 * atom + lane_id() / 4;
    const int before = prefix - key, inside = length - key;
    const uint32_t width = static_cast<uint32_t>(left) + static_cast<uint32_t>(right) + 1u;
    const uint32_t offset = static_cast<uint32_t>(key) - static_cast<uint32_t>(row) + static_cast<uint32_t>(left);
    VLMOPS_UNROLL
    for (int j = 0; j < Block::kTiles; ++j) {
      VLMOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int step = 8 * j + i % 2;
        const bool in_window = offset + static_cast<uint32_t>(step - i / 2 * 8) < width;
        if (!(step < before || (in_window && step < inside))) s[j][i] = -kInfinity;
      }
    }
  }
};

// out [total_q, heads, D], lse [heads, total_q], with SPLIT one of each for each part; q [total_q, heads, D], k and v
// [total_k, heads / group, D] with any token and head strides. Grid: (slots, heads, parts). per_sequence: slots of each
// sequence, or 0: as segments.cuh has them. prefix_lens [n] or null (null with SPLIT); left and right: at most 2^30,
// which is no bound. scale, cap: as Scores has them.
VLMOPS_KERNEL(varlen_attention_forward)
(const T* q, const T* k, const T* v, Out* out, float* lse, const int* cu_q, const int* cu_k, const int* prefix_lens,
 int64_t q_stride, int64_t q_head, int64_t k_stride, int64_t k_head, int64_t v_stride, int64_t v_head, int total_q,
 int total_k, int n, int group, int per_sequence, int left, int right, float scale, float cap) {
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  const int slot = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int heads = static_cast<int>(gridDim.y);
  const int sequence = per_sequence > 0 ? slot / per_sequence : find_segment<kRows>(cu_q, n, total_q, slot);
  const int own = per_sequence > 0 ? slot % per_sequence : slot - first_slot<kRows>(cu_q, sequence, total_q);
  const Segment rows = segment(cu_q, sequence, total_q), keys = segment(cu_k, sequence, total_k);
  const int tile = ceil_div(rows.length, kRows) - 1 - own;  // under a causal mask the last has the most keys
  if (tile < 0) return;
  const int prefix = prefix_lens == nullptr ? 0 : min_of(max_of(prefix_lens[sequence], 0), keys.length);
  const int row0 = tile * kRows, row1 = min_of(row0 + kRows, rows.length);
  const KeySource<T> source{k + keys.start * k_stride + head / group * k_head,
                            v + keys.start * v_stride + head / group * v_head, k_stride, v_stride};
  View view(source, row0, row1, keys.length - rows.length, keys.length, prefix, left, right);
  int64_t token = rows.start + row0, line = head;
  if constexpr (VLMOPS_SPLIT) {
    const int part = static_cast<int>(blockIdx.z);
    take_share<kKeys>(view.first, view.end, part, static_cast<int>(gridDim.z));
    out += static_cast<int64_t>(part) * total_q * heads * VLMOPS_D;
    line += static_cast<int64_t>(part) * heads;
  }
  Block block;
  block.shared = dynamic;
  const Scores<VLMOPS_SOFTCAP> scores{scale, cap};
  block.run(q + token * q_stride + head * q_head, q_stride, row1 - row0, view, scores);
  const int64_t out_stride = static_cast<int64_t>(heads) * VLMOPS_D;
  block.write(out + token * out_stride + static_cast<int64_t>(head) * VLMOPS_D, out_stride,
              lse + line * total_q + token, row1 - row0, scores.factor());
}

}  // namespace vlmops
