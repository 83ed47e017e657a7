// The second step of attention whose keys several blocks shared: every row's parts, each with the log-sum-exp of its
// keys, become one row, in the order of the parts.
//
// VLMOPS_T: bf16 or fp16. VLMOPS_D: elements of a head, a multiple of 8.
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"

namespace vlmops {

using T = VLMOPS_T;

constexpr int kEach = 4;  // elements of a thread: 16 bytes of a part
constexpr int kChunks = VLMOPS_D / kEach;

// out [tokens, heads, D], lse [heads, tokens] of part_out [parts, tokens, heads, D], part_lse [parts, heads, tokens]. A
// part whose lse is -infinity has seen no key and has written nothing. `count`: chunks of out, a thread each.
VLMOPS_KERNEL(attention_combine)
(const float* part_out, const float* part_lse, T* out, float* lse, int parts, int tokens, int heads, int count) {
  const int index = static_cast<int>(blockIdx.x) * VLMOPS_THREADS + static_cast<int>(threadIdx.x);
  if (index >= count) return;
  const int row = index / kChunks, chunk = index % kChunks, rows = tokens * heads;
  const int line = row % heads * tokens + row / heads;
  float top = -kInfinity;
  for (int part = 0; part < parts; ++part) top = max_float(top, part_lse[static_cast<int64_t>(part) * rows + line]);
  const float base = top == -kInfinity ? 0.f : top;
  float total = 0.f, sums[kEach];
  VLMOPS_UNROLL
  for (int i = 0; i < kEach; ++i) sums[i] = 0.f;
  VLMOPS_UNROLL_N(2)
  for (int part = 0; part < parts; ++part) {
    const float part_log = part_lse[static_cast<int64_t>(part) * rows + line];
    if (part_log == -kInfinity) continue;
    const float weight = exp_exact(part_log - base);
    total += weight;
    const auto values = load_vec_readonly<kEach>(part_out + (static_cast<int64_t>(part) * count + index) * kEach);
    VLMOPS_UNROLL
    for (int i = 0; i < kEach; ++i) sums[i] = fma(weight, values[i], sums[i]);
  }
  const float share = total == 0.f ? 0.f : 1.f / total;
  Vec<T, kEach> result;
  VLMOPS_UNROLL
  for (int i = 0; i < kEach; ++i) result[i] = from_float<T>(sums[i] * share);
  store_vec<kEach>(out + static_cast<int64_t>(index) * kEach, result);
  if (chunk == 0) lse[line] = total == 0.f ? -kInfinity : base + log_exact(total);
}

}  // namespace vlmops
