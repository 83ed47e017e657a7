// Where the tiles of a product come from: rows of global memory that cp.async copies to shared memory.
#pragma once

#include "../ptx/memory.cuh"
#include "../ptx/types.cuh"
#include "swizzled.cuh"

namespace vlmops {

// Which of 32 columns lies in row `slot` of the tile of B: in row 8 b + 2 t + e (mma b, pair t, half e), column
// 8 t + 2 b + e.
VLMOPS_DEVICE constexpr int column_of_slot(int slot) {
  return (slot & ~31) + (slot >> 1 & 3) * 8 + (slot >> 3 & 3) * 2 + (slot & 1);
}

// Where a row of a tile comes from: its first element; not inside: a row of zeros.
template <class T>
struct RowStart {
  const T* from;
  bool inside;
};

// Rows first .. of a matrix [rows, K], `stride` elements apart. Columns: in the order of column_of_slot.
template <class T, bool Columns>
struct MatrixRows {
  const T* matrix;
  int64_t stride;
  int first, rows;

  VLMOPS_DEVICE_MEMBER RowStart<T> operator()(int slot) const {
    const int row = first + (Columns ? column_of_slot(slot) : slot);
    return {matrix + (row < rows ? row * stride : 0), row < rows};
  }
};

// Columns n0 .. of two matrices as B: 32 of the first beside the same 32 of the second, so that a thread has both
// products of its columns (GemmTile::each_of).
template <class T>
struct PairedRows {
  const T* first;
  const T* second;
  int64_t first_stride, second_stride;
  int n0, n;

  VLMOPS_DEVICE_MEMBER RowStart<T> operator()(int slot) const {
    const int column = n0 + slot / 64 * 32 + column_of_slot(slot % 32);
    const bool inside = column < n;
    const int64_t row = inside ? column : 0;
    return {slot / 32 % 2 == 0 ? first + row * first_stride : second + row * second_stride, inside};
  }
};

// Element k of a row that lies together.
struct Neighbours {
  VLMOPS_DEVICE_MEMBER int operator()(int k) const { return k; }
};

// Copies Rows rows into a tile, one step of Chunks chunks along k at a time, by all Threads threads. What is outside
// becomes zeros. Wide elements an access: 8, 4 or 2 by cp.async, 1 by registers. Addresses and the row length are whole
// accesses.
template <class T, int Rows, int Chunks, int Threads, int Wide>
struct TileSource {
  static constexpr int kAll = Rows * Chunks, kEach = kAll / Threads;
  static_assert(kAll % Threads == 0 && Threads % Chunks == 0,
                "as much for each thread, always the same chunk of a row");
  RowStart<T> rows[kEach];  // this thread's

  VLMOPS_DEVICE_MEMBER static int row_of(int i) { return (static_cast<int>(threadIdx.x) + i * Threads) / Chunks; }
  VLMOPS_DEVICE_MEMBER static int chunk() { return static_cast<int>(threadIdx.x) % Chunks; }

  // start(row of the tile): its RowStart.
  template <class Start>
  VLMOPS_DEVICE_MEMBER explicit TileSource(const Start& start) {
    VLMOPS_UNROLL
    for (int i = 0; i < kEach; ++i) rows[i] = start(row_of(i));
  }

  // Starts copying columns k .. k + 8 Chunks of `length`; column c is where(c) elements behind the row's first, Wide of
  // them together. The caller commits.
  template <class Where>
  VLMOPS_DEVICE_MEMBER void start(const SwizzledTile<T, Chunks>& tile, int k, int length, const Where& where) const {
    const int column = k + chunk() * 8;
    if constexpr (Wide > 1) {
      VLMOPS_UNROLL
      for (int part = 0; part < 8; part += Wide) {
        const auto offset = where(column + part);
        VLMOPS_UNROLL
        for (int i = 0; i < kEach; ++i) {
          cp_async<Wide * 2>(tile.at(row_of(i), chunk()) + part, rows[i].from + offset,
                             rows[i].inside && column + part < length);
        }
      }
    } else {
      VLMOPS_UNROLL
      for (int i = 0; i < kEach; ++i) {
        Vec<T, 8> whole;
        VLMOPS_UNROLL
        for (int j = 0; j < 8; ++j) {
          whole[j] = rows[i].inside && column + j < length ? rows[i].from[where(column + j)] : T{0};
        }
        store_vec<8>(tile.at(row_of(i), chunk()), whole);
      }
    }
  }
};

// TileSource as GemmTile::run_of has its sources: nothing is left to finish.
template <class Source, class Where>
struct CopiedRows {
  Source source;
  Where where;

  template <class Tile>
  VLMOPS_DEVICE_MEMBER void start(const Tile& tile, int k, int length) const {
    source.start(tile, k, length, where);
  }
  template <class Tile>
  VLMOPS_DEVICE_MEMBER void finish(const Tile&, int) const {}
};

}  // namespace vlmops
