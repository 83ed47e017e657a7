// quick_gelu (CLIP, Qwen2-VL), tanh gates, LayerScale, row masks, residuals and the rounding to float16.
#include "../epilogue.h"

#include "../simd.h"

namespace vlmops {
namespace VLMOPS_ISA {
namespace {

template <int kActivation>
VLMOPS_INLINE Vec activate(Vec x) {
  return kActivation == kQuickGelu ? x * sigmoid(x * set1(1.702f)) : x;
}

template <class P, class T, int kActivation>
void rows(const Epilogue& a, long long first, long long last) {
  const Vec factor = set1(a.factor);
  const long long whole = a.cols - a.cols % kLanes;
  const int rest = static_cast<int>(a.cols - whole);
  for (long long r = first; r < last; ++r) {
    const P* product = static_cast<const P*>(a.product) + r * a.cols;
    const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + r * a.cols;
    T* out = static_cast<T*>(a.out) + r * a.cols;
    const bool open = a.mask == nullptr || a.mask[r] != 0;
    const auto finish = [&](Vec y, Vec scale, Vec more) __attribute__((always_inline)) {
      // a closed row is 0 even where the product is NaN
      const Vec scaled = open ? activate<kActivation>(y) * scale : zero();
      return residual == nullptr ? scaled : scaled + more;
    };
    for (long long c = 0; c < whole; c += kLanes) {
      const Vec scale = a.scale == nullptr ? factor : load(a.scale + c);
      store(out + c, finish(load(product + c), scale, residual == nullptr ? zero() : load(residual + c)));
    }
    if (rest != 0) {
      const Vec scale = a.scale == nullptr ? factor : load_n(a.scale + whole, rest);
      const Vec more = residual == nullptr ? zero() : load_n(residual + whole, rest);
      store_n(out + whole, finish(load_n(product + whole, rest), scale, more), rest);
    }
  }
}

template <class P, class T>
void dispatch(const Epilogue& a, long long first, long long last) {
  a.activation == kQuickGelu ? rows<P, T, kQuickGelu>(a, first, last) : rows<P, T, kNoActivation>(a, first, last);
}

}  // namespace

void epilogue_rows(const Epilogue& a, long long first, long long last) {
  if (a.dtype == kFloat32) return dispatch<float, float>(a, first, last);
  const bool wide = a.product_dtype == kFloat32;
  if (a.dtype == kBFloat16) return wide ? dispatch<float, BF16>(a, first, last) : dispatch<BF16, BF16>(a, first, last);
  return wide ? dispatch<float, FP16>(a, first, last) : dispatch<FP16, FP16>(a, first, last);
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
