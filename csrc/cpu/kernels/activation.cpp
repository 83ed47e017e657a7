// quick_gelu (CLIP, Qwen2-VL): one pass, in float, rounded once.
#include "../activation.h"

#include "../simd.h"

namespace vlmops {
namespace VLMOPS_ISA {

template <class T>
static void quick_gelu(T* x, long long n) {
  const Vec factor = set1(1.702f);
  long long i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {  // two at a time hide the latency of the exponential
    const Vec a = load(x + i), b = load(x + i + kLanes);
    store(x + i, a * sigmoid(a * factor));
    store(x + i + kLanes, b * sigmoid(b * factor));
  }
  for (; i < n; i += kLanes) {
    const int rest = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    const Vec a = load_n(x + i, rest);
    store_n(x + i, a * sigmoid(a * factor), rest);
  }
}

void quick_gelu_inplace(void* x, long long n, int dtype) {
  switch (dtype) {
    case kFloat32: quick_gelu(static_cast<float*>(x), n); break;
    case kBFloat16: quick_gelu(static_cast<BF16*>(x), n); break;
    default: quick_gelu(static_cast<FP16*>(x), n); break;
  }
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
