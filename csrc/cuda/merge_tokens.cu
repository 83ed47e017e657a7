// Image features into text embeddings: number the image tokens, then copy rows. Nothing is read back by the host.
//
// VLMOPS_T: type of the ids. VLMOPS_VEC: ids of an access. VLMOPS_UNIT: bytes of an access to a row.
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"

namespace vlmops {

#ifndef VLMOPS_ENTRY_merge_select

using T = VLMOPS_T;

constexpr int kVec = VLMOPS_VEC;
constexpr int kIds = 16;  // of a thread
constexpr int kSteps = kIds / kVec;
constexpr int kWarps = VLMOPS_THREADS / kWarp;

// Bit step * kVec + i: whether that id of this thread is an image token. A warp has 32 * kIds neighbouring ids.
VLMOPS_DEVICE uint32_t image_bits(const T* ids, int64_t begin, int64_t tokens, int64_t image_token) {
  uint32_t bits = 0;
  VLMOPS_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    const int64_t at = begin + (step * kWarp + lane_id()) * kVec;
    if (at < tokens) {  // then so are the kVec - 1 behind it
      const auto part = load_vec_readonly<kVec>(ids + at);
      VLMOPS_UNROLL
      for (int i = 0; i < kVec; ++i) {
        bits |= static_cast<uint32_t>(static_cast<int64_t>(part[i]) == image_token) << (step * kVec + i);
      }
    }
  }
  return bits;
}

VLMOPS_DEVICE int count_bits(uint32_t bits) {
#ifdef VLMOPS_SIMT
  return __builtin_popcount(bits);
#else
  return __popc(bits);
#endif
}

// Of this block, the same in each thread; `before`: of the warps in front of this one.
VLMOPS_DEVICE int block_sum(int value, int* before) {
  __shared__ int warps[kWarps];
  value = warp_sum(value);
  if (lane_id() == 0) warps[warp_id()] = value;
  __syncthreads();
  int sum = 0, front = 0;
  VLMOPS_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp_id()) front = sum;
    sum += warps[w];
  }
  __syncthreads();  // `warps` serves the next sum
  *before = front;
  return sum;
}

VLMOPS_DEVICE int64_t first_id() { return (static_cast<int64_t>(blockIdx.x) * kWarps + warp_id()) * (kWarp * kIds); }

#endif

#ifdef VLMOPS_ENTRY_merge_count
// counts [blocks]: image tokens of each block's ids.
VLMOPS_KERNEL(merge_count)(const T* ids, int* counts, int64_t tokens, int64_t image_token) {
  int before;
  const int sum = block_sum(count_bits(image_bits(ids, first_id(), tokens, image_token)), &before);
  if (threadIdx.x == 0) counts[blockIdx.x] = sum;
}
#endif

#ifdef VLMOPS_ENTRY_merge_number
// taken [tokens]: the feature row each token takes, -1 for none; places [features]: the token of each row, -1 for none.
// counts: from merge_count, null where one block has all ids.
VLMOPS_KERNEL(merge_number)
(const T* ids, const int* counts, int* taken, int* places, int64_t tokens, int features, int64_t image_token) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t begin = first_id();
  const uint32_t bits = image_bits(ids, begin, tokens, image_token);
  int before, unused;
  int total = block_sum(count_bits(bits), &before);
  if (counts != nullptr) {
    int front = 0, all = 0;
    VLMOPS_UNROLL_N(1)
    for (int b = thread; b < blocks; b += VLMOPS_THREADS) {
      const int n = counts[b];
      all += n;
      if (b < block) front += n;
    }
    before += block_sum(front, &unused);
    total = block_sum(all, &unused);
  }

  const uint32_t below = (1u << lane_id()) - 1u;  // lanes in front of this one
  VLMOPS_UNROLL_N(2)
  for (int step = 0; step < kSteps; ++step) {
    int number = before, seen = 0;
    VLMOPS_UNROLL
    for (int i = 0; i < kVec; ++i) {
      const uint32_t lanes = ballot((bits >> (step * kVec + i) & 1u) != 0);
      number += count_bits(lanes & below);
      seen += count_bits(lanes);
    }
    const int64_t at = begin + (step * kWarp + lane_id()) * kVec;
    Vec<int, kVec> rows;
    VLMOPS_UNROLL
    for (int i = 0; i < kVec; ++i) {
      const bool takes = (bits >> (step * kVec + i) & 1u) != 0 && number < features;
      rows[i] = takes ? number : -1;
      if (takes) places[number] = static_cast<int>(at) + i;
      number += static_cast<int>(bits >> (step * kVec + i) & 1u);
    }
    if (at < tokens) store_vec<kVec>(taken + at, rows);
    before += seen;
  }
  VLMOPS_UNROLL_N(1)
  for (int64_t n = static_cast<int64_t>(total) + block * VLMOPS_THREADS + thread; n < features;
       n += static_cast<int64_t>(blocks) * VLMOPS_THREADS) {
    places[n] = -1;
  }
}
#endif

#ifdef VLMOPS_ENTRY_merge_select
// out [rows, width]: row pick[r] of a where that is not negative, else row r of b; a null a or b stands for zeros.
// Widths and strides in accesses; VLMOPS_LANES threads share a row.
VLMOPS_KERNEL(merge_select)
(const int* pick, const uint16_t* a, const uint16_t* b, uint16_t* out, int64_t a_stride, int64_t b_stride, int rows,
 int width) {
  constexpr int kElements = VLMOPS_UNIT / 2, kRows = VLMOPS_THREADS / VLMOPS_LANES;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / VLMOPS_LANES;
  if (row >= rows) return;
  const int from = pick[row];
  const uint16_t* source = from >= 0 ? a : b;
  if (source != nullptr) source += (from >= 0 ? from * a_stride : row * b_stride) * kElements;
  uint16_t* const to = out + row * width * kElements;
  VLMOPS_UNROLL_N(4)
  for (int c = static_cast<int>(threadIdx.x) % VLMOPS_LANES; c < width; c += VLMOPS_LANES) {
    Vec<uint16_t, kElements> value;
    if (source != nullptr) {
      value = load_vec_readonly<kElements>(source + static_cast<int64_t>(c) * kElements);
    } else {
      VLMOPS_UNROLL
      for (int i = 0; i < kElements; ++i) value[i] = 0;
    }
    store_vec<kElements>(to + static_cast<int64_t>(c) * kElements, value);
  }
}
#endif

}  // namespace vlmops
