// A resampler's attention, forward: the latents of an item over [context; latents], both read where they lie. A block
// has a tile of an item's latents and one head (tile/attention.cuh).
//
// VLMOPS_T: bf16 or fp16. VLMOPS_D: elements of a head, a multiple of 8. VLMOPS_ATOMS: times 16 query rows of a warp.
// VLMOPS_BN: keys of a tile. VLMOPS_STAGES: tiles of the ring. VLMOPS_SPLIT: whether several blocks share the keys.
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/attention.cuh"
#include "tile/segments.cuh"

namespace vlmops {

using T = VLMOPS_T;
using Block = Attention<T, VLMOPS_D, VLMOPS_ATOMS, VLMOPS_BN, VLMOPS_STAGES, VLMOPS_THREADS>;
using Out = OutputOf<T, VLMOPS_SPLIT>::type;

constexpr int kKeys = VLMOPS_BN;

// Every row sees every key. The context's keys have the positions [0, length); the latents' come in tiles of their own,
// from `behind` on.
struct View {
  KeySource<T> context, latent;
  int length, behind, latents;  // latents: keys, 0 without them
  bool work;                    // whether the warp has rows
  int first, end;

  VLMOPS_DEVICE_MEMBER View(const KeySource<T>& context_, const KeySource<T>& latent_, int length_, int latents_,
                            bool work_)
      : context(context_),
        latent(latent_),
        length(length_),
        behind(ceil_div(length_, kKeys) * kKeys),
        latents(latents_),
        work(work_),
        first(0),
        end(latents_ > 0 ? behind + latents_ : length_) {}

  VLMOPS_DEVICE_MEMBER int next(int at) const { return at + kKeys; }
  VLMOPS_DEVICE_MEMBER const T* keys(bool values, int at) const {
    return at < behind ? context.at(values, at) : latent.at(values, at - behind);
  }
  VLMOPS_DEVICE_MEMBER int64_t stride(bool values, int at) const {
    return at < behind ? context.stride(values) : latent.stride(values);
  }
  VLMOPS_DEVICE_MEMBER int count(int at) const { return (at < behind ? length : behind + latents) - at; }
  VLMOPS_DEVICE_MEMBER bool seen(int) const { return work; }
  VLMOPS_DEVICE_MEMBER bool full(int at) const { return count(at) >= kKeys; }
  VLMOPS_DEVICE_MEMBER void mask(float (&s)[Block::kTiles][4], int, int at) const {
    const int inside = count(at) - lane_id() % 4 * 2;
    VLMOPS_UNROLL
    for (int j = 0; j < Block::kTiles; ++j) {
      VLMOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (8 * j + i % 2 >= inside) s[j][i] = -kInfinity;
      }
    }
  }
};

// out [n * latents, heads, D], lse [heads, n * latents], with SPLIT one of each for each part. q [n * latents, heads,
// D]; k, v [total, heads / group, D]; k_latent, v_latent [n * latents, heads / group, D] or null: any token and head
// strides. cu [n + 1]: where each item's context starts. Grid: (items * tiles, heads, parts). scale: as Scores has it.
VLMOPS_KERNEL(perceiver_attention_forward)
(const T* q, const T* k, const T* v, const T* k_latent, const T* v_latent, Out* out, float* lse, const int* cu,
 int64_t q_stride, int64_t q_head, int64_t k_stride, int64_t k_head, int64_t v_stride, int64_t v_head,
 int64_t kl_stride, int64_t kl_head, int64_t vl_stride, int64_t vl_head, int total, int items, int latents, int tiles,
 int group, float scale) {
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  const int item = static_cast<int>(blockIdx.x) / tiles, tile = static_cast<int>(blockIdx.x) % tiles;
  const int head = static_cast<int>(blockIdx.y), heads = static_cast<int>(gridDim.y), kv_head = head / group;
  const int row0 = tile * Block::kRows, rows = min_of(latents - row0, Block::kRows);
  const Segment keys = segment(cu, item, total);
  const int64_t start = static_cast<int64_t>(item) * latents;
  const KeySource<T> context{k + keys.start * k_stride + kv_head * k_head, v + keys.start * v_stride + kv_head * v_head,
                             k_stride, v_stride};
  const KeySource<T> latent{k_latent + start * kl_stride + kv_head * kl_head,
                            v_latent + start * vl_stride + kv_head * vl_head, kl_stride, vl_stride};
  View view(context, latent, keys.length, k_latent == nullptr ? 0 : latents, Block::warp_row() < rows);
  int64_t token = start + row0, total_q = static_cast<int64_t>(items) * latents, line = head;
  if constexpr (VLMOPS_SPLIT) {
    const int part = static_cast<int>(blockIdx.z);
    take_share<kKeys>(view.first, view.end, part, static_cast<int>(gridDim.z));
    out += part * total_q * heads * VLMOPS_D;
    line += static_cast<int64_t>(part) * heads;
  }
  Block block;
  block.shared = dynamic;
  const Scores<false> scores{scale, 0.f};
  block.run(q + token * q_stride + head * q_head, q_stride, rows, view, scores);
  const int64_t out_stride = static_cast<int64_t>(heads) * VLMOPS_D;
  block.write(out + token * out_stride + static_cast<int64_t>(head) * VLMOPS_D, out_stride,
              lse + line * total_q + token, rows, scores.factor());
}

}  // namespace vlmops
