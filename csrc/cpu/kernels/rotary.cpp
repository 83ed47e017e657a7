// x * cos + rotate(x) * sin, a head at a time, and its transpose x * cos - rotate(x * sin).
#include "../rotary.h"

#include "../simd.h"

namespace vlmops {
namespace VLMOPS_ISA {
namespace {

template <bool kInverse>
VLMOPS_INLINE void turn(Vec a, Vec b, Vec ca, Vec cb, Vec sa, Vec sb, Vec& first, Vec& second) {
  first = kInverse ? fma(b, sb, a * ca) : fnma(b, sa, a * ca);
  second = kInverse ? fnma(a, sa, b * cb) : fma(a, sb, b * cb);
}

template <bool kInverse, class T>
VLMOPS_INLINE void halves(const T* x, const float* c, const float* s, T* out, long long half) {
  Vec first, second;
  long long i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    turn<kInverse>(load(x + i), load(x + half + i), load(c + i), load(c + half + i), load(s + i), load(s + half + i),
                   first, second);
    store(out + i, first);
    store(out + half + i, second);
  }
  if (i < half) {
    const int n = static_cast<int>(half - i);
    turn<kInverse>(load_n(x + i, n), load_n(x + half + i, n), load_n(c + i, n), load_n(c + half + i, n),
                   load_n(s + i, n), load_n(s + half + i, n), first, second);
    store_n(out + i, first, n);
    store_n(out + half + i, second, n);
  }
}

// v * c + sign * swapped(v) * s; the transpose swaps the products instead and turns the sign.
template <bool kInverse>
VLMOPS_INLINE Vec turn_pairs(Vec v, Vec c, Vec s, Vec sign) {
  return kInverse ? fnma(swap_pairs(v * s), sign, v * c) : fma(swap_pairs(v) * sign, s, v * c);
}

template <bool kInverse, class T>
VLMOPS_INLINE void pairs(const T* x, const float* c, const float* s, T* out, long long dim) {
  float odd[kLanes];
  for (int i = 0; i < kLanes; ++i) odd[i] = i % 2 ? 1.f : -1.f;
  const Vec sign = load(static_cast<const float*>(odd));
  long long i = 0;
  for (; i + kLanes <= dim; i += kLanes)
    store(out + i, turn_pairs<kInverse>(load(x + i), load(c + i), load(s + i), sign));
  if (i < dim) {
    const int n = static_cast<int>(dim - i);
    store_n(out + i, turn_pairs<kInverse>(load_n(x + i, n), load_n(c + i, n), load_n(s + i, n), sign), n);
  }
}

template <bool kInverse, class T>
void tokens(const Rotary& a, long long first, long long last) {
  const unsigned long rest = static_cast<unsigned long>(a.dim - a.turned) * sizeof(T);
  for (long long t = first; t < last; ++t) {
    const float *c = a.cos + t * a.turned, *s = a.sin + t * a.turned;
    for (int p = 0; p < a.num_parts; ++p) {
      const RotaryHeads& part = a.parts[p];
      const T* x = static_cast<const T*>(part.x) + t * part.stride_t;
      T* out = static_cast<T*>(part.out) + t * part.heads * a.dim;
      for (long long h = 0; h < part.heads; ++h, x += part.stride_h, out += a.dim) {
        if (a.interleaved) pairs<kInverse>(x, c, s, out, a.turned);
        else halves<kInverse>(x, c, s, out, a.turned / 2);
        if (rest != 0) __builtin_memcpy(out + a.turned, x + a.turned, rest);
      }
    }
  }
}

template <class T>
void by_direction(const Rotary& a, long long first, long long last) {
  a.inverse ? tokens<true, T>(a, first, last) : tokens<false, T>(a, first, last);
}

}  // namespace

void rotary_tokens(const Rotary& a, long long first, long long last) {
  switch (a.dtype) {
    case kFloat32: by_direction<float>(a, first, last); break;
    case kBFloat16: by_direction<BF16>(a, first, last); break;
    default: by_direction<FP16>(a, first, last); break;
  }
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
