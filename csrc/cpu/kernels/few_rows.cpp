// Products of a few rows with a weight nobody packed: its 16-bit elements are widened in registers.
#include "../few_rows.h"

#include "../simd.h"

namespace vlmops {
namespace VLMOPS_ISA {
namespace {

constexpr int kAhead = 1024;  // bytes by which the weight is asked for early

VLMOPS_INLINE Vec activate(Vec x, int activation) {
  switch (activation) {
    case kFewRowsGelu: return x * set1(0.5f) * (set1(1.f) + erf(x * set1(0.70710678f)));
    case kFewRowsGeluTanh: {
      const Vec inner = x * set1(0.79788456f) * fma(x * x, set1(0.044715f), set1(1.f));
      return x * set1(0.5f) * (set1(1.f) + tanh(inner));
    }
    case kFewRowsSilu: return x * sigmoid(x);
    default: return x;
  }
}

// MR rows of x against NR rows of the weight, KR vectors along the sum at a time, each with sums of its own.
template <class T, class O, int MR, int NR, int KR>
VLMOPS_INLINE void tile(const FewRows& a, long long row, long long col) {
  const float* x = a.x + row * a.depth;
  const T* w = static_cast<const T*>(a.weight) + col * a.depth;
  Vec sum[KR][MR][NR];
#pragma GCC unroll 4
  for (int u = 0; u < KR; ++u) {
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) sum[u][i][j] = zero();
    }
  }
  const auto add = [&](int u, long long k, const auto& read) __attribute__((always_inline)) {
    Vec part[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) part[i] = read(x + i * a.depth + k);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      const Vec wide = read(w + j * a.depth + k);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) sum[u][i][j] = fma(part[i], wide, sum[u][i][j]);
    }
  };
  const auto whole = [](const auto* p) __attribute__((always_inline)) { return load(p); };
  long long k = 0;
  for (; k + KR * kLanes <= a.depth; k += KR * kLanes) {
    if (NR == 1) __builtin_prefetch(reinterpret_cast<const char*>(w + k) + kAhead);
#pragma GCC unroll 4
    for (int u = 0; u < KR; ++u) add(u, k + u * kLanes, whole);
  }
  for (; k + kLanes <= a.depth; k += kLanes) add(0, k, whole);
  const int rest = static_cast<int>(a.depth - k);
  if (rest != 0) add(0, k, [rest](const auto* p) __attribute__((always_inline)) { return load_n(p, rest); });

  const Vec bias = a.bias == nullptr ? zero() : load_n(static_cast<const T*>(a.bias) + col, NR);
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    float each[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
#pragma GCC unroll 4
      for (int u = 1; u < KR; ++u) sum[0][i][j] = sum[0][i][j] + sum[u][i][j];
      each[j] = reduce_add(sum[0][i][j]);
    }
    const Vec y = load_n(static_cast<const float*>(each), NR) + bias;
    store_n(static_cast<O*>(a.out) + (row + i) * a.cols + col, activate(y, a.activation), NR);
  }
}

// One row of the weight after the other, a single stream: as fast as the memory gives it (four streams: a fifth
// slower).
template <class T, class O, int MR>
void stream(const FewRows& a, long long first, long long last) {
  for (long long col = first; col < last; ++col) tile<T, O, MR, 1, 4>(a, 0, col);
}

// Groups of rows against NR rows of the weight at a time, which share what they read of x and stay in the cache for the
// next group.
template <class T, class O, int NR>
void groups(const FewRows& a, long long first, long long last) {
  for (long long col = first; col + NR <= last; col += NR) {
    long long row = 0;
    for (; row + 3 <= a.rows; row += 3) tile<T, O, 3, NR, 1>(a, row, col);  // 12 sums, 3 of x: 16 registers
    if (a.rows - row == 2) tile<T, O, 2, NR, 1>(a, row, col);
    else if (a.rows - row == 1) tile<T, O, 1, NR, 1>(a, row, col);
  }
}

template <class T, class O>
void run(const FewRows& a, long long first, long long last) {
  if (a.rows == 1) return stream<T, O, 1>(a, first, last);
  if (a.rows == 2) return stream<T, O, 2>(a, first, last);
  const long long whole = first + (last - first) / 4 * 4;
  groups<T, O, 4>(a, first, whole);
  groups<T, O, 1>(a, whole, last);
}

}  // namespace

void few_rows_columns(const FewRows& a, long long first, long long last) {
  if (a.dtype == kFloat32) return run<float, float>(a, first, last);
  const bool wide = a.out_dtype == kFloat32;
  if (a.dtype == kBFloat16) return wide ? run<BF16, float>(a, first, last) : run<BF16, BF16>(a, first, last);
  return wide ? run<FP16, float>(a, first, last) : run<FP16, FP16>(a, first, last);
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
