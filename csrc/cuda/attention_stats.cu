// What every gradient of an attention needs of a row: {log2(e) lse, delta}, delta = rowsum(dout * out) - dlse.
//
// VLMOPS_T: bf16 or fp16. VLMOPS_D: elements of a head, a multiple of 8, at most 256.
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"

namespace vlmops {

using T = VLMOPS_T;

constexpr int kChunks = VLMOPS_D / 8;
constexpr int kLanes = kChunks <= 1    ? 1
                       : kChunks <= 2  ? 2
                       : kChunks <= 4  ? 4
                       : kChunks <= 8  ? 8
                       : kChunks <= 16 ? 16
                                       : 32;
constexpr int kAtOnce = kWarp / kLanes;  // rows of a warp
constexpr int kRows = 32;                // of a warp in all: whole sectors of stats

// stats [heads, tokens, 2]; out, dout [tokens, heads, D] with any token and head strides; lse [heads, tokens], and dlse
// or null. An lse of -infinity (no key) becomes 0: all scores of that row are masked. Grid: (tiles of rows, heads).
VLMOPS_KERNEL(attention_stats)
(const T* out, const T* dout, const float* lse, const float* dlse, float* stats, int64_t out_stride, int64_t out_head,
 int64_t dout_stride, int64_t dout_head, int tokens) {
  const int64_t head = blockIdx.y;
  const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * (VLMOPS_THREADS / kWarp) + warp_id()) * kRows;
  if (row0 >= tokens) return;
  out += row0 * out_stride + head * out_head;
  dout += row0 * dout_stride + head * dout_head;
  const int rows = static_cast<int>(min_of(tokens - row0, static_cast<int64_t>(kRows)));
  const int chunk = lane_id() % kLanes;
  float mine = 0.f;  // delta of the row with this lane's number
  VLMOPS_UNROLL_N(2)
  for (int first = 0; first < kRows; first += kAtOnce) {
    const int row = first + lane_id() / kLanes;
    float sum = 0.f;
    if (row < rows && (kLanes == kChunks || chunk < kChunks)) {
      const auto o = load_vec_readonly<8>(out + row * out_stride + chunk * 8);
      const auto d = load_vec_readonly<8>(dout + row * dout_stride + chunk * 8);
      VLMOPS_UNROLL
      for (int i = 0; i < 8; ++i) sum = fma(to_float(o[i]), to_float(d[i]), sum);
    }
    sum = shfl(warp_sum<kLanes>(sum), lane_id() % kAtOnce * kLanes);
    if (lane_id() / kAtOnce == first / kAtOnce) mine = sum;
  }
  if (lane_id() < rows) {
    const int64_t at = head * tokens + row0 + lane_id();
    if (dlse != nullptr) mine -= dlse[at];
    const float value = lse[at];
    store_vec<2>(stats + 2 * at, Vec<float, 2>{value == -kInfinity ? 0.f : value * kLog2E, mine});
  }
}

}  // namespace vlmops
