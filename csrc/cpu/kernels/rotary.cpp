// x * cos + rotate(x) * sin, a head at a time.
#include "../rotary.h"

#include "../simd.h"

namespace vlmops {
namespace VLMOPS_ISA {

template <class T>
VLMOPS_INLINE void halves(const T* x, const float* c, const float* s, T* out, long long half) {
  for (long long i = 0; i < half; i += kLanes) {
    const int n = half - i < kLanes ? static_cast<int>(half - i) : kLanes;
    const Vec a = load_n(x + i, n), b = load_n(x + half + i, n);
    store_n(out + i, fnma(b, load_n(s + i, n), a * load_n(c + i, n)), n);
    store_n(out + half + i, fma(a, load_n(s + half + i, n), b * load_n(c + half + i, n)), n);
  }
}

template <class T>
VLMOPS_INLINE void pairs(const T* x, const float* c, const float* s, T* out, long long dim) {
  float odd[kLanes];
  for (int i = 0; i < kLanes; ++i) odd[i] = i % 2 ? 1.f : -1.f;
  const Vec sign = load(static_cast<const float*>(odd));
  for (long long i = 0; i < dim; i += kLanes) {
    const int n = dim - i < kLanes ? static_cast<int>(dim - i) : kLanes;
    const Vec v = load_n(x + i, n);
    store_n(out + i, fma(swap_pairs(v) * sign, load_n(s + i, n), v * load_n(c + i, n)), n);
  }
}

template <class T>
static void tokens(const Rotary& a, long long first, long long last) {
  for (long long t = first; t < last; ++t) {
    const T* x = static_cast<const T*>(a.x) + t * a.stride_t;
    T* out = static_cast<T*>(a.out) + t * a.heads * a.dim;
    const float *c = a.cos + t * a.dim, *s = a.sin + t * a.dim;
    for (long long h = 0; h < a.heads; ++h, x += a.stride_h, out += a.dim) {
      if (a.interleaved)
        pairs(x, c, s, out, a.dim);
      else
        halves(x, c, s, out, a.dim / 2);
    }
  }
}

void rotary_tokens(const Rotary& a, long long first, long long last) {
  switch (a.dtype) {
    case kFloat32: tokens<float>(a, first, last); break;
    case kBFloat16: tokens<BF16>(a, first, last); break;
    default: tokens<FP16>(a, first, last); break;
  }
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
