// A block's tile of C = A B^T by tensor cores: A [M, K] and B [N, K] of 16-bit elements, sums in float registers.
//
// Stages tiles of A and B are in shared memory; cp.async fills one while mma.sync reads another. A thread of an mma
// holds pairs of columns 8 apart, too narrow to write well. So the rows of B lie in shared memory in another order, in
// which the columns a thread gets from 32 are 8 neighbours: 16-byte accesses, whole sectors, no exchange.
#pragma once

#include "../mma/sm80.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/warp.cuh"
#include "sources.cuh"
#include "swizzled.cuh"

namespace vlmops {

// BM x BN x BK tiles, a warp to WM x WN of it.
template <class T, int BM, int BN, int BK, int WM, int WN, int Stages, int Wide>
struct GemmTile {
  static constexpr int kThreads = BM / WM * (BN / WN) * kWarp, kChunks = BK / 8;
  static constexpr int kStage = (BM + BN) * BK;  // elements
  static_assert(BM % WM == 0 && BN % WN == 0 && WM % 16 == 0 && WN % 32 == 0 && BK % 16 == 0, "whole mma");
  using Tile = SwizzledTile<T, kChunks>;

  float sums[WM / 16][WN / 8][4];

  VLMOPS_DEVICE_MEMBER static int warp_row() { return warp_id() / (BN / WN) * WM; }
  VLMOPS_DEVICE_MEMBER static int warp_column() { return warp_id() % (BN / WN) * WN; }

  // The sums of rows m0 .. m0 + BM of A, columns n0 .. n0 + BN. `shared`: Stages * kStage elements.
  VLMOPS_DEVICE_MEMBER void run(T* shared, const T* a, int64_t a_stride, int m, int m0, const T* b, int64_t b_stride,
                                int n, int n0, int length) {
    run(shared, MatrixRows<T, false>{a, a_stride, m0, m}, Neighbours{}, MatrixRows<T, true>{b, b_stride, n0, n},
        length);
  }
  // The same of any rows: start_a, start_b and where_a as TileSource has them.
  template <class StartA, class WhereA, class StartB>
  VLMOPS_DEVICE_MEMBER void run(T* shared, const StartA& start_a, const WhereA& where_a, const StartB& start_b,
                                int length) {
    CopiedRows<TileSource<T, BM, kChunks, kThreads, Wide>, WhereA> rows{
        TileSource<T, BM, kChunks, kThreads, Wide>(start_a), where_a};
    CopiedRows<TileSource<T, BN, kChunks, kThreads, Wide>, Neighbours> columns{
        TileSource<T, BN, kChunks, kThreads, Wide>(start_b), Neighbours{}};
    run_of(shared, rows, columns, length);
  }
  // The same with sources of their own: start(tile, k, length) as TileSource has it, and finish(tile, k) to write what
  // registers hold of it, after the products that hide its way.
  template <class RowsA, class RowsB>
  VLMOPS_DEVICE_MEMBER void run_of(T* shared, RowsA& rows, RowsB& columns, int length) {
    VLMOPS_UNROLL
    for (int i = 0; i < WM / 16; ++i) {
      VLMOPS_UNROLL
      for (int j = 0; j < WN / 8; ++j) {
        VLMOPS_UNROLL
        for (int c = 0; c < 4; ++c) sums[i][j][c] = 0.f;
      }
    }
    const int steps = ceil_div(length, BK);
    const auto start = [&](int step) {
      if (step < steps) {
        T* const stage = shared + step % Stages * kStage;
        rows.start(Tile{stage}, step * BK, length);
        columns.start(Tile{stage + BM * BK}, step * BK, length);
      }
      cp_async_commit();  // also where nothing was started: the wait below counts groups
    };
    const auto finish = [&](int step) {
      if (step < steps) {
        T* const stage = shared + step % Stages * kStage;
        rows.finish(Tile{stage}, step * BK);
        columns.finish(Tile{stage + BM * BK}, step * BK);
      }
    };
    VLMOPS_UNROLL
    for (int step = 0; step < Stages - 1; ++step) {
      start(step);
      finish(step);
    }
    for (int step = 0; step < steps; ++step) {
      cp_async_wait_group<Stages - 2>();
      __syncthreads();  // the step has arrived for all; all have read the stage that is filled next
      start(step + Stages - 1);
      T* const stage = shared + step % Stages * kStage;
      multiply(Tile{stage}, Tile{stage + BM * BK});
      finish(step + Stages - 1);
    }
  }

  // f(row, column, eight sums of neighbouring columns) for all this thread has, of the tile's own rows and columns, a
  // group of columns after the other; `begin(column)` before each.
  template <class Begin, class F>
  VLMOPS_DEVICE_MEMBER void each(Begin begin, F f) {
    each_of<1>(begin, [&](int row, int column, float (&v)[1][8]) { f(row, column, v[0]); });
  }

  // The same of so many matrices side by side (PairedRows): f(row, column, eight sums of each).
  template <int Products, class Begin, class F>
  VLMOPS_DEVICE_MEMBER void each_of(Begin begin, F f) {
    static_assert(WN % (32 * Products) == 0, "a warp has all products of its columns");
    VLMOPS_UNROLL
    for (int j = 0; j < WN; j += 32 * Products) {
      const int column = (warp_column() + j) / Products + lane_id() % 4 * 8;
      begin(column);
      VLMOPS_UNROLL
      for (int i = 0; i < WM / 8; ++i) {
        float v[Products][8];
        VLMOPS_UNROLL
        for (int p = 0; p < Products; ++p) eight(v[p], i, j + 32 * p);
        f(warp_row() + i * 8 + lane_id() / 4, column, v);
      }
    }
  }

 private:
  // Of eights of rows the i-th, of the columns from j on.
  VLMOPS_DEVICE_MEMBER void eight(float (&v)[8], int i, int j) const {
    VLMOPS_UNROLL
    for (int c = 0; c < 8; ++c) v[c] = sums[i / 2][j / 8 + c / 2][i % 2 * 2 + c % 2];
  }
  VLMOPS_DEVICE_MEMBER void multiply(const Tile& rows, const Tile& columns) {
    const int lane = lane_id();
    VLMOPS_UNROLL
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      uint32_t a[WM / 16][4];
      VLMOPS_UNROLL
      for (int i = 0; i < WM / 16; ++i) ldmatrix_x4(a[i], rows.at(warp_row() + i * 16 + lane % 16, chunk + lane / 16));
      VLMOPS_UNROLL
      for (int j = 0; j < WN / 8; j += 2) {
        uint32_t b[4];
        const int slot = warp_column() + j * 8 + lane / 16 * 8 + lane % 8;
        ldmatrix_x4(b, columns.at(slot, chunk + lane / 8 % 2));
        VLMOPS_UNROLL
        for (int i = 0; i < WM / 16; ++i) {
          mma_m16n8k16<T>(sums[i][j], a[i], b[0], b[1]);
          mma_m16n8k16<T>(sums[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
};

// Row and column of a tile in the grid: groups of Group rows of tiles, walked column by column, so that the blocks that
// run together share both operands in the L2 cache.
template <int Group>
VLMOPS_DEVICE void grouped(int tile, int tiles_m, int tiles_n, int& row, int& column) {
  const int64_t whole = static_cast<int64_t>(Group) * tiles_n;
  const int group = static_cast<int>(tile / whole), inside = static_cast<int>(tile % whole);
  const int height = min_of(Group, tiles_m - group * Group);
  row = group * Group + inside % height;
  column = inside / height;
}

}  // namespace vlmops
