// Operands of mma.sync m16n8k16 from tiles in shared memory. Chunks are 8 elements of 16 bits: a step of 16 along k is
// two of them, and the last half of a step is zero where a tile has an odd number. Rows begin at a multiple of 8.
#pragma once

#include "../ptx/memory.cuh"
#include "../ptx/warp.cuh"
#include "swizzled.cuh"

namespace vlmops {

// lane_id() as the compiler does not know it: addresses made of it are computed where they are used, a few instructions
// a tile, and do not hold registers for a whole loop.
VLMOPS_DEVICE int fresh_lane() {
  int lane = lane_id();
#ifndef VLMOPS_SIMT
  asm volatile("" : "+r"(lane));
#endif
  return lane;
}

// A [16, 16]: rows row .. row + 16, k along the row.
template <class T, int Chunks>
VLMOPS_DEVICE void load_a(uint32_t (&a)[4], const SwizzledTile<T, Chunks>& tile, int row, int step, int lane) {
  if (2 * step + 1 < Chunks) {
    ldmatrix_x4(a, tile.at(row, lane & 15, 2 * step + (lane >> 4)));
  } else {
    uint32_t half[2];
    ldmatrix_x2(half, tile.at(row, lane & 15, 2 * step));
    a[0] = half[0];
    a[1] = half[1];
    a[2] = a[3] = 0;
  }
}

// B [16, 16] of rows that are columns of B (k along the row): b[i] is of columns row + 8 i .. row + 8 i + 8.
template <class T, int Chunks>
VLMOPS_DEVICE void load_b(uint32_t (&b)[2][2], const SwizzledTile<T, Chunks>& tile, int row, int step, int lane) {
  if (2 * step + 1 < Chunks) {
    uint32_t part[4];
    ldmatrix_x4(part, tile.at(row, (lane & 7) + (lane >> 4) * 8, 2 * step + (lane >> 3 & 1)));
    b[0][0] = part[0];
    b[0][1] = part[1];
    b[1][0] = part[2];
    b[1][1] = part[3];
  } else {
    uint32_t half[2];
    ldmatrix_x2(half, tile.at(row, lane & 15, 2 * step));
    b[0][0] = half[0];
    b[1][0] = half[1];
    b[0][1] = b[1][1] = 0;
  }
}

// B [16, 16] of rows that are rows of B (k across rows): b[i] is of chunk + i; b[1] is not set past the last chunk.
template <class T, int Chunks>
VLMOPS_DEVICE void load_b_trans(uint32_t (&b)[2][2], const SwizzledTile<T, Chunks>& tile, int row, int chunk,
                                int lane) {
  if (chunk + 1 < Chunks) {
    uint32_t part[4];
    ldmatrix_x4_trans(part, tile.at(row, lane & 15, chunk + (lane >> 4)));
    b[0][0] = part[0];
    b[0][1] = part[1];
    b[1][0] = part[2];
    b[1][1] = part[3];
  } else {
    ldmatrix_x2_trans(b[0], tile.at(row, lane & 15, chunk));
  }
}

}  // namespace vlmops
