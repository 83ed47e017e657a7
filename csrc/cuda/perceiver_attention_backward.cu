// The gradient of a resampler's queries: an item's latents over [context; latents] (tile/attention_backward.cuh). Those
// of the keys are varlen_attention_backward.cu's, one source at a time.
//
// VLMOPS_T: bf16 or fp16. VLMOPS_D: elements of a head, a multiple of 8. VLMOPS_ATOMS: times 16 rows of a warp.
// VLMOPS_OTHERS: keys of a tile that passes, VLMOPS_STEP of them at once.
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"
#include "tile/attention_backward.cuh"
#include "tile/segments.cuh"

namespace vlmops {

using T = VLMOPS_T;
using Block = AttentionGradient<T, VLMOPS_D, VLMOPS_ATOMS, VLMOPS_OTHERS, VLMOPS_STEP, VLMOPS_THREADS, false>;

constexpr int kOthers = VLMOPS_OTHERS;

// Keys and values of one item and key head.
struct Source {
  const T *k, *v;
  int64_t k_stride, v_stride;
};

// Every row sees every key. The context's keys have the positions [0, length); the latents' come in tiles of their own,
// from `behind` on.
struct View {
  Source context, latent;
  int length, behind, end;
  bool work;  // whether the warp has rows

  VLMOPS_DEVICE_MEMBER Passing begin() const { return {0, 0}; }
  VLMOPS_DEVICE_MEMBER bool more(Passing at) const { return at.at < end; }
  VLMOPS_DEVICE_MEMBER Passing next(Passing at) const { return {at.at + kOthers, 0}; }
  VLMOPS_DEVICE_MEMBER int64_t stride(bool second, Passing at) const {
    return at.at < behind ? (second ? context.v_stride : context.k_stride)
                          : (second ? latent.v_stride : latent.k_stride);
  }
  VLMOPS_DEVICE_MEMBER const T* rows(bool second, Passing at) const {
    const int row = at.at < behind ? at.at : at.at - behind;
    return (at.at < behind ? (second ? context.v : context.k) : (second ? latent.v : latent.k)) +
           row * stride(second, at);
  }
  VLMOPS_DEVICE_MEMBER int count(Passing at) const { return (at.at < behind ? length : end) - at.at; }
  VLMOPS_DEVICE_MEMBER void start(int, Passing) const {}
  VLMOPS_DEVICE_MEMBER bool seen(Passing, int) const { return work; }
  VLMOPS_DEVICE_MEMBER bool full(Passing at, int) const { return count(at) >= kOthers; }
  VLMOPS_DEVICE_MEMBER void mask(float (&s)[Block::kTiles][4], int, Passing at, int, int part) const {
    const int inside = count(at) - part - lane_id() % 4 * 2;
    VLMOPS_UNROLL
    for (int j = 0; j < Block::kTiles; ++j) {
      VLMOPS_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (8 * j + i % 2 >= inside) s[j][i] = -kInfinity;
      }
    }
  }
};

// dq [n * latents, heads, D]; q, dout [n * latents, heads, D], k, v [total, heads / group, D], k_latent, v_latent [n *
// latents, heads / group, D]: any token and head strides; stats [heads, n * latents, 2]. cu [n + 1]: where each item's
// context starts. Grid: (items * tiles, heads). score_scale: as ScoreSlopes has it.
VLMOPS_KERNEL(perceiver_attention_dq)
(const T* q, const T* k, const T* v, const T* k_latent, const T* v_latent, const T* dout, const float* stats, T* dq,
 const int* cu, int64_t q_stride, int64_t q_head, int64_t k_stride, int64_t k_head, int64_t v_stride, int64_t v_head,
 int64_t kl_stride, int64_t kl_head, int64_t vl_stride, int64_t vl_head, int64_t dout_stride, int64_t dout_head,
 int total, int items, int latents, int tiles, int group, float scale, float score_scale) {
  VLMOPS_DYNAMIC_SHARED(T, dynamic);
  const int item = static_cast<int>(blockIdx.x) / tiles, tile = static_cast<int>(blockIdx.x) % tiles;
  const int head = static_cast<int>(blockIdx.y), kv_head = head / group;
  const int row0 = tile * Block::kOwn, rows = min_of(latents - row0, Block::kOwn);
  const Segment keys = segment(cu, item, total);
  const int64_t start = static_cast<int64_t>(item) * latents, token = start + row0;
  const int behind = ceil_div(keys.length, kOthers) * kOthers;
  const View view{
      {k + keys.start * k_stride + kv_head * k_head, v + keys.start * v_stride + kv_head * v_head, k_stride, v_stride},
      {k_latent + start * kl_stride + kv_head * kl_head, v_latent + start * vl_stride + kv_head * vl_head, kl_stride,
       vl_stride},
      keys.length,
      behind,
      behind + latents,
      Block::warp_own() < rows};
  Block block;
  block.shared = dynamic;
  block.run(q + token * q_stride + head * q_head, dout + token * dout_stride + head * dout_head, q_stride, dout_stride,
            rows, stats + 2 * (static_cast<int64_t>(head) * items * latents + token), view,
            ScoreSlopes<false>{score_scale, 0.f});
  const int64_t stride = static_cast<int64_t>(gridDim.y) * VLMOPS_D;
  block.write(dq + token * stride + static_cast<int64_t>(head) * VLMOPS_D, nullptr, stride, rows, scale);
}

}  // namespace vlmops
