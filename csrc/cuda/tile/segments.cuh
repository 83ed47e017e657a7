// Packed sequences: which tile of which sequence a block works on. No host reads cu_seqlens.
#pragma once

#include "../ptx/platform.cuh"
#include "../ptx/warp.cuh"

namespace vlmops {

struct Segment {
  int start, length;
};

// Where sequence i starts, clamped to the tensor: a GPU must not fault on a malformed cu_seqlens.
VLMOPS_DEVICE int segment_start(const int* cu, int i, int total) { return min_of(max_of(cu[i], 0), total); }

VLMOPS_DEVICE Segment segment(const int* cu, int i, int total) {
  const int start = segment_start(cu, i, total);
  return {start, max_of(segment_start(cu, i + 1, total) - start, 0)};
}

// Sequence i owns slots start / Tile + i to the next one's: at least as many as it has tiles, total / Tile + n of all.
template <int Tile>
VLMOPS_DEVICE int first_slot(const int* cu, int i, int total) {
  return segment_start(cu, i, total) / Tile + i;
}

// The sequence that owns a slot: the last one whose first slot is not behind it. A warp probes 32 at a time.
template <int Tile>
VLMOPS_DEVICE int find_segment(const int* cu, int n, int total, int slot) {
  int begin = 0, count = n;
  while (count > 1) {
    const int step = (count + kWarp - 1) / kWarp, offset = lane_id() * step;
    const bool before = offset < count && first_slot<Tile>(cu, begin + offset, total) <= slot;
    const uint32_t lanes = ballot(before) >> 1;  // lane 0 is: it starts at or before the slot
    int last = 0;
    VLMOPS_UNROLL
    for (int bits = 16; bits > 0; bits /= 2) {
      if ((lanes >> (last + bits - 1) & 1u) != 0) last += bits;
    }
    begin += last * step;
    count = min_of(step, count - last * step);
  }
  return begin;
}

}  // namespace vlmops
