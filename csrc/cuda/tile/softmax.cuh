// Online softmax of scores in mma.sync's accumulator layout: a thread has elements of rows g and g + 8, and the four
// lanes of a quad share a row.
#pragma once

#include "../ptx/math.cuh"
#include "../ptx/types.cuh"
#include "../ptx/warp.cuh"

namespace vlmops {

// Two rows' running maxima, the same in a quad, and this thread's part of their sums.
struct RowState {
  float top[2];
  float total[2];

  VLMOPS_DEVICE_MEMBER void clear() {
    top[0] = top[1] = -kInfinity;
    total[0] = total[1] = 0.f;
  }
};

// Takes in scores s [16, 8 * Tiles], which become weights exp2(factor * (s - top)); acc [16, 8 * Outs] is brought to
// the new maxima. factor > 0; a score that must not count is -infinity, and a NaN stays one.
template <int Tiles, int Outs>
VLMOPS_DEVICE void take_scores(float (&s)[Tiles][4], float (&acc)[Outs][4], RowState& state, float factor) {
  VLMOPS_UNROLL
  for (int r = 0; r < 2; ++r) {
    float top = state.top[r];
    VLMOPS_UNROLL
    for (int j = 0; j < Tiles; ++j) top = max_float(top, max_float(s[j][2 * r], s[j][2 * r + 1]));
    top = warp_max<4>(top);
    const float base = top == -kInfinity ? 0.f : top * factor;  // a row that has seen no key yet
    const float keep = exp2_fast(fma(state.top[r], factor, -base));
    float total = state.total[r] * keep;
    VLMOPS_UNROLL
    for (int j = 0; j < Tiles; ++j) {
      VLMOPS_UNROLL
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        s[j][i] = exp2_fast(fma(s[j][i], factor, -base));
        total += s[j][i];
      }
    }
    VLMOPS_UNROLL
    for (int j = 0; j < Outs; ++j) {
      acc[j][2 * r] *= keep;
      acc[j][2 * r + 1] *= keep;
    }
    state.top[r] = top;
    state.total[r] = total;
  }
}

// The weights of 16 keys as an A operand, rounded to T.
template <class T, int Tiles>
VLMOPS_DEVICE void weights_as_a(uint32_t (&a)[4], const float (&s)[Tiles][4], int step) {
  VLMOPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float* const pair = &s[2 * step + i / 2][i % 2 * 2];
    a[i] = pack2<T>(pair[0], pair[1]);
  }
}

// Divides acc by the sums; lse[r]: the natural logarithm of row r's sum of exponentials. A row without keys gives 0 and
// -infinity.
template <int Outs>
VLMOPS_DEVICE void finish_rows(float (&acc)[Outs][4], float (&lse)[2], const RowState& state, float factor) {
  VLMOPS_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float total = warp_sum<4>(state.total[r]);
    const bool empty = total == 0.f;
    const float share = empty ? 0.f : 1.f / total;
    lse[r] = empty ? -kInfinity : fma(state.top[r], factor, log2_exact(total)) * kLn2;
    VLMOPS_UNROLL
    for (int j = 0; j < Outs; ++j) {
      acc[j][2 * r] *= share;
      acc[j][2 * r + 1] *= share;
    }
  }
}

}  // namespace vlmops
