// Rows between global memory and tiles in shared memory, 16 bytes an access.
#pragma once

#include "../ptx/memory.cuh"
#include "../ptx/warp.cuh"
#include "swizzled.cuh"

namespace vlmops {

// Starts copying `count` rows of global memory, `stride` elements apart, into a tile of Rows rows, by all Threads
// threads of the block; rows from `count` on become zeros. Addresses are 16-byte aligned. The caller commits.
template <int Rows, int Threads, class T, int Chunks>
VLMOPS_DEVICE void copy_rows_async(const SwizzledTile<T, Chunks>& tile, const T* from, int64_t stride, int count) {
  constexpr int kAtOnce = Threads / Chunks;  // rows; a thread keeps its chunk
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % Chunks;
  if (Threads % Chunks != 0 && thread >= kAtOnce * Chunks) return;
  const T* source = from + thread / Chunks * stride + chunk * tile.kElements;
  VLMOPS_UNROLL
  for (int first = 0; first < Rows; first += kAtOnce) {
    const int row = first + thread / Chunks;
    if (Rows % kAtOnce != 0 && row >= Rows) break;
    const bool valid = row < count;
    cp_async16(kAtOnce % 8 == 0 ? tile.at(first, thread / Chunks, chunk) : tile.at(row, chunk), valid ? source : from,
               valid);
    source += kAtOnce * stride;
  }
}

// Writes rows first .. first + Rows of a tile (first a multiple of 8) to global memory, `count` of them at the most, by
// one warp.
template <int Rows, class T, int Chunks>
VLMOPS_DEVICE void store_rows(T* to, int64_t stride, const SwizzledTile<T, Chunks>& tile, int first, int count) {
  constexpr int kAll = Rows * Chunks, kElements = SwizzledTile<T, Chunks>::kElements;
  VLMOPS_UNROLL
  for (int begin = 0; begin < kAll; begin += kWarp) {
    const int i = begin + lane_id(), row = i / Chunks, chunk = i % Chunks;
    if (row < count && (kAll % kWarp == 0 || i < kAll)) {
      store_vec<kElements>(to + row * stride + chunk * kElements, load_vec<kElements>(tile.at(first, row, chunk)));
    }
  }
}

}  // namespace vlmops
