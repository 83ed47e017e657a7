// A block's tile of C = A B^T by tensor cores: A [M, K] and B [N, K] of 16-bit elements, sums in float registers.
//
// Stages tiles of A and B are in shared memory; cp.async fills one while mma.sync reads another. A thread of an mma
// holds pairs of columns 8 apart, too narrow to write well. So the rows of B lie in shared memory in another order, in
// which the columns a thread gets from 32 are 8 neighbours: 16-byte accesses, whole sectors, no exchange.
#pragma once

#include "../mma/sm80.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/warp.cuh"

namespace vlmops {

// Rows of 4 or 8 chunks of 16 bytes that change places by XOR: a chunk of 8 neighbouring rows, which ldmatrix reads,
// and 8 neighbouring chunks, which a copy writes, lie in all 32 banks.
template <class T, int Chunks>
struct GemmRows {
  static_assert(sizeof(T) == 2 && (Chunks == 4 || Chunks == 8), "rows of 64 or 128 bytes");
  T* base;  // 128-byte aligned

  VLMOPS_DEVICE_MEMBER T* at(int row, int chunk) const {
    return base + (row * Chunks + (chunk ^ (row / (8 / Chunks) & (Chunks - 1)))) * 8;
  }
};

// Which of 32 columns lies in row `slot` of the tile of B: in row 8 b + 2 t + e (mma b, pair t, half e), column
// 8 t + 2 b + e.
VLMOPS_DEVICE constexpr int column_of_slot(int slot) {
  return (slot & ~31) + (slot >> 1 & 3) * 8 + (slot >> 3 & 3) * 2 + (slot & 1);
}

// Copies Rows rows from a matrix into a tile, one step of Chunks chunks along k at a time, by all Threads threads. Rows
// and columns outside the matrix become zeros. Wide elements an access: 8, 4 or 2 by cp.async, 1 by registers.
// Addresses and the row length are whole accesses. Columns: the rows are in the order of column_of_slot.
template <class T, int Rows, int Chunks, int Threads, int Wide, bool Columns>
struct TileSource {
  static constexpr int kAll = Rows * Chunks, kEach = kAll / Threads;
  static_assert(kAll % Threads == 0 && Threads % Chunks == 0,
                "as much for each thread, always the same chunk of a row");
  const T* from[kEach];  // where this thread's chunk of each of its rows begins
  bool inside[kEach];

  VLMOPS_DEVICE_MEMBER static int row_of(int i) { return (static_cast<int>(threadIdx.x) + i * Threads) / Chunks; }
  VLMOPS_DEVICE_MEMBER static int chunk() { return static_cast<int>(threadIdx.x) % Chunks; }

  VLMOPS_DEVICE_MEMBER TileSource(const T* matrix, int64_t stride, int first, int rows) {
    VLMOPS_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int row = first + (Columns ? column_of_slot(row_of(i)) : row_of(i));
      inside[i] = row < rows;
      from[i] = matrix + (inside[i] ? row * stride : 0) + chunk() * 8;
    }
  }

  // Starts copying columns k .. k + 8 Chunks. The caller commits.
  VLMOPS_DEVICE_MEMBER void start(const GemmRows<T, Chunks>& tile, int k, int length) const {
    const int left = length - k - chunk() * 8;
    VLMOPS_UNROLL
    for (int i = 0; i < kEach; ++i) {
      T* const to = tile.at(row_of(i), chunk());
      if constexpr (Wide > 1) {
        VLMOPS_UNROLL
        for (int part = 0; part < 8; part += Wide) {
          cp_async<Wide * 2>(to + part, from[i] + k + part, inside[i] && part < left);
        }
      } else {
        Vec<T, 8> part;
        VLMOPS_UNROLL
        for (int j = 0; j < 8; ++j) part[j] = inside[i] && j < left ? from[i][k + j] : T{0};
        store_vec<8>(to, part);
      }
    }
  }
};

// BM x BN x BK tiles, a warp to WM x WN of it.
template <class T, int BM, int BN, int BK, int WM, int WN, int Stages, int Wide>
struct GemmTile {
  static constexpr int kThreads = BM / WM * (BN / WN) * kWarp, kChunks = BK / 8;
  static constexpr int kStage = (BM + BN) * BK;  // elements
  static_assert(BM % WM == 0 && BN % WN == 0 && WM % 16 == 0 && WN % 32 == 0 && BK % 16 == 0, "whole mma");
  using Tile = GemmRows<T, kChunks>;

  float sums[WM / 16][WN / 8][4];

  VLMOPS_DEVICE_MEMBER static int warp_row() { return warp_id() / (BN / WN) * WM; }
  VLMOPS_DEVICE_MEMBER static int warp_column() { return warp_id() % (BN / WN) * WN; }

  // The sums of rows m0 .. m0 + BM, columns n0 .. n0 + BN. `shared`: Stages * kStage elements.
  VLMOPS_DEVICE_MEMBER void run(T* shared, const T* a, int64_t a_stride, int m, int m0, const T* b, int64_t b_stride,
                                int n, int n0, int length) {
    VLMOPS_UNROLL
    for (int i = 0; i < WM / 16; ++i) {
      VLMOPS_UNROLL
      for (int j = 0; j < WN / 8; ++j) {
        VLMOPS_UNROLL
        for (int c = 0; c < 4; ++c) sums[i][j][c] = 0.f;
      }
    }
    const TileSource<T, BM, kChunks, kThreads, Wide, false> rows(a, a_stride, m0, m);
    const TileSource<T, BN, kChunks, kThreads, Wide, true> columns(b, b_stride, n0, n);
    const int steps = ceil_div(length, BK);
    const auto start = [&](int step) {
      if (step < steps) {
        T* const stage = shared + step % Stages * kStage;
        rows.start(Tile{stage}, step * BK, length);
        columns.start(Tile{stage + BM * BK}, step * BK, length);
      }
      cp_async_commit();  // also where nothing was started: the wait below counts groups
    };
    VLMOPS_UNROLL
    for (int step = 0; step < Stages - 1; ++step) start(step);
    for (int step = 0; step < steps; ++step) {
      cp_async_wait_group<Stages - 2>();
      __syncthreads();  // the step has arrived for all; all have read the stage that is filled next
      start(step + Stages - 1);
      T* const stage = shared + step % Stages * kStage;
      multiply(Tile{stage}, Tile{stage + BM * BK});
    }
  }

  // f(row, column, eight sums of neighbouring columns) for all this thread has, of the tile's own rows and columns, a
  // group of columns after the other; `begin(column)` before each.
  template <class Begin, class F>
  VLMOPS_DEVICE_MEMBER void each(Begin begin, F f) {
    const int group = lane_id() / 4, part = lane_id() % 4;
    VLMOPS_UNROLL
    for (int j = 0; j < WN; j += 32) {
      const int column = warp_column() + j + part * 8;
      begin(column);
      VLMOPS_UNROLL
      for (int i = 0; i < WM / 8; ++i) {
        float v[8];
        VLMOPS_UNROLL
        for (int c = 0; c < 8; ++c) v[c] = sums[i / 2][j / 8 + c / 2][i % 2 * 2 + c % 2];
        f(warp_row() + i * 8 + group, column, v);
      }
    }
  }

 private:
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
