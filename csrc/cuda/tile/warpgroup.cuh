// What the kernels of sm_90a share: warpgroups, and the ring of tiles between a producer and its consumers.
#pragma once

#include "../ptx/platform.cuh"
#include "../ptx/sm90.cuh"
#include "../ptx/warp.cuh"

namespace vlmops {

constexpr int kWarpgroup = 128;

VLMOPS_DEVICE int warpgroup_id() { return static_cast<int>(threadIdx.x) / kWarpgroup; }

// A ring of stages: which one is next, and the parity of its phase.
template <int Stages>
struct RingPosition {
  int stage = 0, parity = 0;

  VLMOPS_DEVICE_MEMBER void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Whether stages are full and empty again; in shared memory. `readers`: warps that give a stage back.
template <int Stages>
struct RingBarriers {
  uint64_t full[Stages], empty[Stages];

  VLMOPS_DEVICE_MEMBER void init(int readers) {  // all threads
    if (threadIdx.x == 0) {
      VLMOPS_UNROLL
      for (int i = 0; i < Stages; ++i) {
        mbarrier_init(&full[i], 1);
        mbarrier_init(&empty[i], readers);
      }
      mbarrier_fence();
    }
    __syncthreads();
  }
  VLMOPS_DEVICE_MEMBER void give_back(int stage) {
    if (lane_id() == 0) mbarrier_arrive(&empty[stage]);
  }
};

// Of a row of 32 columns in accumulators, lane t of four has pairs 2 t, 2 t + 1 of each eight columns, v[2 i] and
// v[2 i + 1] of the i-th. Pair i of lane t becomes pair t of lane i: lane t then has columns 8 t .. 8 t + 8.
VLMOPS_DEVICE void exchange_pairs(float (&v)[8], int t) {
  VLMOPS_UNROLL
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (t & bit) != 0;
    VLMOPS_UNROLL
    for (int i = 0; i < 8; ++i) {
      if ((i / 2 & bit) != 0) continue;
      float& low = v[i];
      float& high = v[i + 2 * bit];
      const float got = shfl_xor(upper ? low : high, bit);
      low = upper ? got : low;
      high = upper ? high : got;
    }
  }
}

}  // namespace vlmops
