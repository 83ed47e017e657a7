// Products of a few rows with a weight nobody packed: its 16-bit elements are widened in registers.
#include "../few_rows.h"

#include "../simd.h"

namespace vlmops {
namespace VLMOPS_ISA {
namespace {

constexpr int kColumns = 4;  // streams of the weight at a time: more would outrun the prefetchers

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

// MR rows of x against NR rows of the weight: sums of kLanes parts, added up once at the end.
template <class T, class O, int MR, int NR>
VLMOPS_INLINE void tile(const FewRows& a, long long row, long long col) {
  const float* x = a.x + row * a.depth;
  const T* w = static_cast<const T*>(a.weight) + col * a.depth;
  Vec sum[MR][NR];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) sum[i][j] = zero();
  }
  const auto add = [&](const Vec(&part)[MR], Vec wide, int j) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) sum[i][j] = fma(part[i], wide, sum[i][j]);
  };
  Vec part[MR];
  const long long whole = a.depth - a.depth % kLanes;
  for (long long k = 0; k < whole; k += kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) part[i] = load(x + i * a.depth + k);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) add(part, load(w + j * a.depth + k), j);
  }
  const int rest = static_cast<int>(a.depth - whole);
  if (rest != 0) {
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) part[i] = load_n(x + i * a.depth + whole, rest);
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) add(part, load_n(w + j * a.depth + whole, rest), j);
  }
  const Vec bias = a.bias == nullptr ? zero() : load_n(static_cast<const T*>(a.bias) + col, NR);
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) {
    float each[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) each[j] = reduce_add(sum[i][j]);
    const Vec y = load_n(static_cast<const float*>(each), NR) + bias;
    store_n(static_cast<O*>(a.out) + (row + i) * a.cols + col, activate(y, a.activation), NR);
  }
}

// All rows against NR rows of the weight, which stay in the cache for the second group of rows.
template <class T, class O, int NR>
void columns(const FewRows& a, long long first, long long last) {
  constexpr int kMost = NR == 1 ? 4 : 3;  // 12 sums and 3 parts of x fill 16 registers
  for (long long col = first; col + NR <= last; col += NR) {
    long long row = 0;
    for (; row + kMost <= a.rows; row += kMost) tile<T, O, kMost, NR>(a, row, col);
    switch (a.rows - row) {
      case 3: tile<T, O, 3, NR>(a, row, col); break;
      case 2: tile<T, O, 2, NR>(a, row, col); break;
      case 1: tile<T, O, 1, NR>(a, row, col); break;
      default: break;
    }
  }
}

template <class T, class O>
void run(const FewRows& a, long long first, long long last) {
  const long long whole = first + (last - first) / kColumns * kColumns;
  columns<T, O, kColumns>(a, first, whole);
  columns<T, O, 1>(a, whole, last);
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
