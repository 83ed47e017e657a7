// Few rows times matrices [N, K] that are read once, past sums in registers.
#pragma once

#include "../ptx/math.cuh"
#include "../ptx/memory.cuh"
#include "../ptx/warp.cuh"

namespace vlmops {

// A warp's Columns columns of Products products of Rows rows: its lanes stride along k, Wide elements an access, each
// with its own sums, reduced once. Lane r Columns + c then has row r, column c of each product.
template <class T, int Rows, int Columns, int Products, int Wide>
struct StreamedRows {
  static_assert(Rows * Columns <= kWarp, "a lane to each result");
  float mine[Products][1];

  VLMOPS_DEVICE_MEMBER static int row() { return lane_id() / Columns; }  // from Rows on: nothing
  VLMOPS_DEVICE_MEMBER static int column() { return lane_id() % Columns; }

  // start_a, where_a: as TileSource has them; rows_of_b(p): those of product p, its first row again past the last one.
  // `first`: of the columns.
  template <class StartA, class WhereA, class RowsOfB>
  VLMOPS_DEVICE_MEMBER void run(const StartA& start_a, const WhereA& where_a, const RowsOfB& rows_of_b, int first,
                                int length) {
    const T* a[Rows];
    VLMOPS_UNROLL
    for (int r = 0; r < Rows; ++r) a[r] = start_a(r).from;
    const T* b[Products][Columns];
    float sums[Rows][Products][Columns];
    VLMOPS_UNROLL
    for (int p = 0; p < Products; ++p) {
      VLMOPS_UNROLL
      for (int c = 0; c < Columns; ++c) {
        b[p][c] = rows_of_b(p)(first + c).from;
        VLMOPS_UNROLL
        for (int r = 0; r < Rows; ++r) sums[r][p][c] = 0.f;
      }
    }
    VLMOPS_UNROLL_N(2)
    for (int k = lane_id() * Wide; k < length; k += kWarp * Wide) {
      Vec<T, Wide> w[Products][Columns];
      VLMOPS_UNROLL
      for (int p = 0; p < Products; ++p) {
        VLMOPS_UNROLL
        for (int c = 0; c < Columns; ++c) w[p][c] = load_vec_readonly<Wide>(b[p][c] + k);
      }
      const auto offset = where_a(k);
      VLMOPS_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const auto part = load_vec_readonly<Wide>(a[r] + offset);
        VLMOPS_UNROLL
        for (int j = 0; j < Wide; ++j) {
          VLMOPS_UNROLL
          for (int p = 0; p < Products; ++p) {
            VLMOPS_UNROLL
            for (int c = 0; c < Columns; ++c) {
              sums[r][p][c] = fma(to_float(part[j]), to_float(w[p][c][j]), sums[r][p][c]);
            }
          }
        }
      }
    }
    VLMOPS_UNROLL
    for (int p = 0; p < Products; ++p) {
      mine[p][0] = 0.f;
      VLMOPS_UNROLL
      for (int r = 0; r < Rows; ++r) {
        VLMOPS_UNROLL
        for (int c = 0; c < Columns; ++c) {
          const float sum = warp_sum(sums[r][p][c]);
          if (lane_id() == r * Columns + c) mine[p][0] = sum;
        }
      }
    }
  }
};

}  // namespace vlmops
