// A block's tile of A B^T in float, by exact FMA: A [M, K], and Products matrices [N, K], which read A's tile together.
#pragma once

#include "../ptx/math.cuh"
#include "../ptx/memory.cuh"
#include "sources.cuh"

namespace vlmops {

// Tiles of 64 x 64 of each product by 256 threads, 4 x 4 of each a thread; 16 along k at a time from shared memory, the
// next 16 wait in registers.
template <int Products, int Wide>
struct FloatTile {
  static constexpr int kTile = 64, kDepth = 16, kEach = 4, kThreads = 256;
  // Operands, k first; eights of rows change places by k / 4, so that a warp writes 8 rows x 4 of these to all banks.
  using Shared = float[1 + Products][kDepth][kTile];

  float sums[kEach][Products][kEach];  // of each row, of each product

  VLMOPS_DEVICE_MEMBER static int row() { return static_cast<int>(threadIdx.x) / 16 * kEach; }
  VLMOPS_DEVICE_MEMBER static int column() { return static_cast<int>(threadIdx.x) % 16 * kEach; }

  // The row of a tile that this thread reads of each operand.
  VLMOPS_DEVICE_MEMBER static int load_row() { return static_cast<int>(threadIdx.x) / 4; }

  // start_a, where_a: as TileSource has them; rows_of_b(p): those of product p. `shared`: 16-byte aligned.
  template <class StartA, class WhereA, class RowsOfB>
  VLMOPS_DEVICE_MEMBER void run(Shared& shared, const StartA& start_a, const WhereA& where_a, const RowsOfB& rows_of_b,
                                int length) {
    const RowStart<float> a = start_a(load_row());
    run_from(shared, [&](float (&to)[4], int k) { read(to, a, where_a, k, length); }, rows_of_b, length);
  }
  // The same with a source of A of its own: read_a(to, k) reads elements k .. k + 4 of row load_row(), zeros outside.
  template <class ReadA, class RowsOfB>
  VLMOPS_DEVICE_MEMBER void run_from(Shared& shared, const ReadA& read_a, const RowsOfB& rows_of_b, int length) {
    const int load_row = FloatTile::load_row(), load_k = static_cast<int>(threadIdx.x) % 4 * 4;
    RowStart<float> from[Products];
    VLMOPS_UNROLL
    for (int p = 0; p < Products; ++p) from[p] = rows_of_b(p)(load_row);
    float next[1 + Products][4];
    const auto load = [&](int at) {
      read_a(next[0], at + load_k);
      VLMOPS_UNROLL
      for (int p = 0; p < Products; ++p) read(next[1 + p], from[p], Neighbours{}, at + load_k, length);
    };
    VLMOPS_UNROLL
    for (int p = 0; p < Products; ++p) {
      VLMOPS_UNROLL
      for (int i = 0; i < kEach * kEach; ++i) sums[i / kEach][p][i % kEach] = 0.f;
    }
    load(0);
    for (int at = 0; at < length; at += kDepth) {
      VLMOPS_UNROLL
      for (int o = 0; o <= Products; ++o) {
        VLMOPS_UNROLL
        for (int i = 0; i < 4; ++i) shared[o][load_k + i][load_row ^ load_k * 2] = next[o][i];
      }
      __syncthreads();
      if (at + kDepth < length) load(at + kDepth);
      multiply(shared);
      __syncthreads();
    }
  }

 private:
  // Four elements from k on; zeros outside.
  template <class Where>
  VLMOPS_DEVICE_MEMBER static void read(float (&to)[4], const RowStart<float>& row, const Where& where, int k,
                                        int length) {
    VLMOPS_UNROLL
    for (int i = 0; i < 4; i += Wide) {
      VLMOPS_UNROLL
      for (int j = 0; j < Wide; ++j) to[i + j] = 0.f;
      if (row.inside && k + i < length) {
        const auto part = load_vec_readonly<Wide>(row.from + where(k + i));
        VLMOPS_UNROLL
        for (int j = 0; j < Wide; ++j) to[i + j] = part[j];
      }
    }
  }

  VLMOPS_DEVICE_MEMBER void multiply(const Shared& shared) {
    VLMOPS_UNROLL
    for (int d = 0; d < kDepth; ++d) {
      const auto a = load_vec<kEach>(&shared[0][d][row() ^ d / 4 * 8]);
      VLMOPS_UNROLL
      for (int p = 0; p < Products; ++p) {
        const auto b = load_vec<kEach>(&shared[1 + p][d][column() ^ d / 4 * 8]);
        VLMOPS_UNROLL
        for (int i = 0; i < kEach; ++i) {
          VLMOPS_UNROLL
          for (int j = 0; j < kEach; ++j) sums[i][p][j] = fma(a[i], b[j], sums[i][p][j]);
        }
      }
    }
  }
};

}  // namespace vlmops
