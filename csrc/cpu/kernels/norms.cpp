// One row at a time: statistics in two short passes over a row that is in the first-level cache, then one pass that
// writes it. Memory is read once and written once.
#include "../norms.h"

#include "../simd.h"

namespace vlmops {
namespace VLMOPS_ISA {
namespace {

VLMOPS_INLINE Vec rounded(Vec v, const float*) { return v; }
VLMOPS_INLINE Vec rounded(Vec v, const BF16*) { return round_bf16(v); }
VLMOPS_INLINE Vec rounded(Vec v, const FP16*) { return round_fp16(v); }

// Calls full(i) for every whole vector of n elements, then part(i, rest) for the rest.
template <class Full, class Part>
VLMOPS_INLINE void each_vector(int n, Full full, Part part) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) full(i);
  if (i < n) part(i, n - i);
}

// Sum of f(i, v) over the row p, in four chains so that the adds overlap.
template <class T, class F>
VLMOPS_INLINE float row_sum(const T* p, int n, F f) {
  Vec s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    s0 = f(load(p + i), s0);
    s1 = f(load(p + i + kLanes), s1);
    s2 = f(load(p + i + 2 * kLanes), s2);
    s3 = f(load(p + i + 3 * kLanes), s3);
  }
  for (; i + kLanes <= n; i += kLanes) s0 = f(load(p + i), s0);
  // The last, short vector: its missing lanes keep the running sum (f of a missing 0 need not be neutral).
  if (i < n) s1 = select(first_n(n - i), f(load_n(p + i, n - i), s1), s1);
  return reduce_add((s0 + s1) + (s2 + s3));
}

struct Stats {
  float mean, rstd;
};

template <class T, bool kCenter>
VLMOPS_INLINE Stats row_stats(const T* h, int n, float eps) {
  const float inverse = 1.f / static_cast<float>(n);
  Stats s = {0.f, 0.f};
  float square;
  if (kCenter) {
    s.mean = row_sum(h, n, [](Vec v, Vec sum) __attribute__((always_inline)) { return sum + v; }) * inverse;
    const Vec mean = set1(s.mean);
    square = row_sum(h, n, [mean](Vec v, Vec sum) __attribute__((always_inline)) {
      const Vec d = v - mean;
      return fma(d, d, sum);
    });
  } else {
    square = row_sum(h, n, [](Vec v, Vec sum) __attribute__((always_inline)) { return fma(v, v, sum); });
  }
  s.rstd = 1.f / __builtin_sqrtf(square * inverse + eps);
  return s;
}

template <class T, class W, bool kCenter>
void forward_rows(const NormForward& a, long long first, long long last) {
  const int n = static_cast<int>(a.cols);
  const W* weight = static_cast<const W*>(a.weight);
  const W* bias = static_cast<const W*>(a.bias);
  const Vec offset = set1(a.offset);
  const bool round_first = !kCenter && a.offset == 0.f && weight != nullptr;
  for (long long row = first; row < last; ++row) {
    const T* h = static_cast<const T*>(a.x) + row * a.cols;
    if (a.residual != nullptr) {
      const T* x = h;
      const T* r = static_cast<const T*>(a.residual) + row * a.cols;
      T* total = static_cast<T*>(a.total) + row * a.cols;
      each_vector(
          n, [&](int i) __attribute__((always_inline)) { store(total + i, load(x + i) + load(r + i)); },
          [&](int i, int m)
              __attribute__((always_inline)) { store_n(total + i, load_n(x + i, m) + load_n(r + i, m), m); });
      h = total;
    }
    const Stats s = row_stats<T, kCenter>(h, n, a.eps);
    const Vec mean = set1(s.mean), rstd = set1(s.rstd);
    T* out = static_cast<T*>(a.out) + row * a.cols;
    const auto hat = [mean, rstd](Vec v)
                         __attribute__((always_inline)) { return kCenter ? (v - mean) * rstd : v * rstd; };
    if (weight == nullptr) {
      each_vector(
          n,
          [&](int i) __attribute__((always_inline)) {
            const Vec y = hat(load(h + i));
            store(out + i, bias != nullptr ? y + load(bias + i) : y);
          },
          [&](int i, int m) __attribute__((always_inline)) {
            const Vec y = hat(load_n(h + i, m));
            store_n(out + i, bias != nullptr ? y + load_n(bias + i, m) : y, m);
          });
    } else if (round_first) {
      each_vector(
          n,
          [&](int i)
              __attribute__((always_inline)) { store(out + i, rounded(hat(load(h + i)), h) * load(weight + i)); },
          [&](int i, int m) __attribute__((always_inline)) {
            store_n(out + i, rounded(hat(load_n(h + i, m)), h) * load_n(weight + i, m), m);
          });
    } else if (bias == nullptr) {
      each_vector(
          n,
          [&](int i) __attribute__((always_inline)) { store(out + i, hat(load(h + i)) * (load(weight + i) + offset)); },
          [&](int i, int m) __attribute__((always_inline)) {
            store_n(out + i, hat(load_n(h + i, m)) * (load_n(weight + i, m) + offset), m);
          });
    } else {
      each_vector(
          n,
          [&](int i) __attribute__((always_inline)) {
            store(out + i, fma(hat(load(h + i)), load(weight + i) + offset, load(bias + i)));
          },
          [&](int i, int m) __attribute__((always_inline)) {
            store_n(out + i, fma(hat(load_n(h + i, m)), load_n(weight + i, m) + offset, load_n(bias + i, m)), m);
          });
    }
  }
}

template <class T, class W, bool kCenter>
void backward_rows(const NormBackward& a, long long first, long long last) {
  const int n = static_cast<int>(a.cols);
  const float inverse = 1.f / static_cast<float>(n);
  const W* weight = static_cast<const W*>(a.weight);
  const Vec offset = set1(a.offset), one = set1(1.f);
  for (long long row = first; row < last; ++row) {
    const T* h = static_cast<const T*>(a.h) + row * a.cols;
    const T* grad = static_cast<const T*>(a.grad) + row * a.cols;
    const Stats s = row_stats<T, kCenter>(h, n, a.eps);
    const Vec mean = set1(s.mean), rstd = set1(s.rstd);
    const auto hat = [mean, rstd](Vec v)
                         __attribute__((always_inline)) { return kCenter ? (v - mean) * rstd : v * rstd; };
    Vec sum_g = zero(), sum_gx = zero();
    // Missing lanes of a short vector have grad 0 and so add nothing to any sum.
    each_vector(
        n,
        [&](int i) __attribute__((always_inline)) {
          const Vec g = load(grad + i), x = hat(load(h + i));
          if (a.dweight != nullptr) store(a.dweight + i, fma(g, x, load(a.dweight + i)));
          if (a.dbias != nullptr) store(a.dbias + i, load(a.dbias + i) + g);
          const Vec gw = g * (weight != nullptr ? load(weight + i) + offset : one);
          sum_g = sum_g + gw;
          sum_gx = fma(gw, x, sum_gx);
        },
        [&](int i, int m) __attribute__((always_inline)) {
          const Vec g = load_n(grad + i, m), x = hat(load_n(h + i, m));
          if (a.dweight != nullptr) store_n(a.dweight + i, fma(g, x, load_n(a.dweight + i, m)), m);
          if (a.dbias != nullptr) store_n(a.dbias + i, load_n(a.dbias + i, m) + g, m);
          const Vec gw = g * (weight != nullptr ? load_n(weight + i, m) + offset : one);
          // hat(0) is not 0 in a centred row, and 0 * inf is NaN where a row overflows.
          sum_g = sum_g + gw;
          sum_gx = select(first_n(m), fma(gw, x, sum_gx), sum_gx);
        });
    if (a.dx == nullptr) continue;
    const Vec mean_g = kCenter ? set1(reduce_add(sum_g) * inverse) : zero();
    const Vec mean_gx = set1(reduce_add(sum_gx) * inverse);
    T* dx = static_cast<T*>(a.dx) + row * a.cols;
    const T* more = a.grad_total != nullptr ? static_cast<const T*>(a.grad_total) + row * a.cols : nullptr;
    each_vector(
        n,
        [&](int i) __attribute__((always_inline)) {
          const Vec gw = load(grad + i) * (weight != nullptr ? load(weight + i) + offset : one);
          const Vec d = fnma(hat(load(h + i)), mean_gx, gw - mean_g) * rstd;
          store(dx + i, more != nullptr ? d + load(more + i) : d);
        },
        [&](int i, int m) __attribute__((always_inline)) {
          const Vec gw = load_n(grad + i, m) * (weight != nullptr ? load_n(weight + i, m) + offset : one);
          const Vec d = fnma(hat(load_n(h + i, m)), mean_gx, gw - mean_g) * rstd;
          store_n(dx + i, more != nullptr ? d + load_n(more + i, m) : d, m);
        });
  }
}

template <class T, class W>
void forward_kind(const NormForward& a, long long first, long long last) {
  a.center ? forward_rows<T, W, true>(a, first, last) : forward_rows<T, W, false>(a, first, last);
}

template <class T, class W>
void backward_kind(const NormBackward& a, long long first, long long last) {
  a.center ? backward_rows<T, W, true>(a, first, last) : backward_rows<T, W, false>(a, first, last);
}

}  // namespace

void norm_forward(const NormForward& a, long long first, long long last) {
  if (a.dtype == kFloat32) return forward_kind<float, float>(a, first, last);
  if (a.dtype == kBFloat16) {
    return a.float_params ? forward_kind<BF16, float>(a, first, last) : forward_kind<BF16, BF16>(a, first, last);
  }
  return a.float_params ? forward_kind<FP16, float>(a, first, last) : forward_kind<FP16, FP16>(a, first, last);
}

void norm_backward(const NormBackward& a, long long first, long long last) {
  if (a.dtype == kFloat32) return backward_kind<float, float>(a, first, last);
  if (a.dtype == kBFloat16) {
    return a.float_params ? backward_kind<BF16, float>(a, first, last) : backward_kind<BF16, BF16>(a, first, last);
  }
  return a.float_params ? backward_kind<FP16, float>(a, first, last) : backward_kind<FP16, FP16>(a, first, last);
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
