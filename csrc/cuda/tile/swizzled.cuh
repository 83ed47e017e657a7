// A tile of rows in shared memory, in 16-byte chunks, placed so that 8 neighbouring rows at one chunk meet all 32 banks
// (what ldmatrix reads), and neighbouring chunks of a row too (what a copy writes).
#pragma once

#include "../ptx/platform.cuh"

namespace vlmops {

// Rows of Chunks chunks, without padding. A row starts Chunks * 16 bytes after the one before: rows that are a multiple
// of 8 / gcd(Chunks, 8) apart start in the same bank, and swap chunks by XOR. An odd number of chunks needs no swap.
template <class T, int Chunks>
struct SwizzledTile {
  static constexpr int kElements = 16 / sizeof(T);  // of a chunk
  static constexpr int kSwap = Chunks % 8 == 0 ? 8 : Chunks % 4 == 0 ? 4 : Chunks % 2 == 0 ? 2 : 1;
  static constexpr int kSame = kSwap == 8 ? 0 : kSwap == 4 ? 1 : 2;  // log2 of the rows that swap alike
  T* base;  // 128-byte aligned, or a multiple of 8 rows behind such an address

  VLMOPS_DEVICE_MEMBER T* at(int row, int chunk) const {
    const int low = chunk & (kSwap - 1);  // apart, so that chunks kSwap apart have addresses a constant apart
    return base + (row * Chunks + (chunk - low) + (low ^ (row >> kSame & (kSwap - 1)))) * kElements;
  }
  // Chunk of row first + row, `first` a multiple of 8: addresses of one row and chunk then differ by constants.
  VLMOPS_DEVICE_MEMBER T* at(int first, int row, int chunk) const {
    return at(row, chunk) + first * (Chunks * kElements);
  }
};

}  // namespace vlmops
