// Tiles of C = A B^T for sm_90a: a producer warp fills a ring of stages by TMA, two warpgroups multiply by wgmma, each
// 64 of the 128 rows. Blocks are persistent: while one tile is finished the next one's operands are on their way.
#pragma once

#include "../mma/sm90.cuh"
#include "../ptx/sm90.cuh"
#include "../ptx/warp.cuh"
#include "warpgroup.cuh"

namespace vlmops {

// BN columns; K in steps of 64 (a row of a tile is 128 bytes).
template <class T, int BN, int Stages>
struct WarpgroupGemm {
  static constexpr int kThreads = 3 * kWarpgroup, kRows = 128, kStep = 64;
  static constexpr int kStage = (kRows + BN) * kStep;                      // elements
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 128 * 40 + 256 * 232 <= 65536
  using Barriers = RingBarriers<Stages>;
  using Position = RingPosition<Stages>;

  float sums[BN / 8][4];

  // One thread: the steps of a tile into the ring; load(stage's rows, stage's columns, barrier, k).
  template <class Load>
  VLMOPS_DEVICE_MEMBER static void produce(T* ring, Barriers& barriers, Position& at, int length, const Load& load) {
    for (int k = 0; k < length; k += kStep) {
      mbarrier_wait(&barriers.empty[at.stage], at.parity ^ 1);
      mbarrier_arrive_expect(&barriers.full[at.stage], kStage * static_cast<int>(sizeof(T)));
      T* const stage = ring + at.stage * kStage;
      load(stage, stage + kRows * kStep, &barriers.full[at.stage], k);
      at.advance();
    }
  }

  // Warpgroups 1 and 2: the sums of the tile.
  VLMOPS_DEVICE_MEMBER void multiply(const T* ring, Barriers& barriers, Position& at, int length) {
    VLMOPS_UNROLL
    for (int i = 0; i < BN / 2; ++i) sums[i / 4][i % 4] = 0.f;
    int before = 0;
    VLMOPS_UNROLL_N(1)
    for (int k = 0; k < length; k += kStep) {
      mbarrier_wait(&barriers.full[at.stage], at.parity);
      const T* const stage = ring + at.stage * kStage;
      const T* const rows = stage + (warpgroup_id() - 1) * 64 * kStep;
      wgmma_keep(sums);
      wgmma_fence();
      VLMOPS_UNROLL
      for (int step = 0; step < kStep; step += 16) {
        wgmma<BN, T>(sums, tile_descriptor(rows + step), tile_descriptor(stage + kRows * kStep + step), true);
      }
      wgmma_commit();
      wgmma_keep(sums);
      wgmma_wait<1>();  // the products of the step before
      if (k > 0) barriers.give_back(before);
      before = at.stage;
      at.advance();
    }
    wgmma_wait<0>();
    wgmma_keep(sums);
    barriers.give_back(before);
  }

  // f(row, column, eight sums of neighbouring columns) for all this thread has, of the tile's own rows and columns, a
  // group of columns after the other; `begin(column)` before each. The four lanes of a row exchange their pairs.
  template <class Begin, class F>
  VLMOPS_DEVICE_MEMBER void each(Begin begin, F f) {
    const int t = lane_id() % 4;
    const int row = (static_cast<int>(threadIdx.x) - kWarpgroup) / kWarp * 16 + lane_id() / 4;
    VLMOPS_UNROLL
    for (int j = 0; j < BN; j += 32) {
      begin(j + 8 * t);
      VLMOPS_UNROLL
      for (int half = 0; half < 2; ++half) {
        float v[8];
        VLMOPS_UNROLL
        for (int i = 0; i < 8; ++i) v[i] = sums[j / 8 + i / 2][half * 2 + i % 2];
        exchange_pairs(v, t);
        f(row + 8 * half, j + 8 * t, v);
      }
    }
  }
};

}  // namespace vlmops
