// Conversions, one element a thread. See test_types.py.
#include "ptx/types.cuh"

namespace vlmops {

using T = VLMOPS_T;

#ifdef VLMOPS_ENTRY_widen
VLMOPS_KERNEL(widen)(const T* x, float* y) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  y[i] = to_float(x[i]);
}
#endif

#ifdef VLMOPS_ENTRY_narrow  // one at a time, and as the halves of packed pairs
VLMOPS_KERNEL(narrow)(const float* x, T* y, uint32_t* pairs, float* unpacked) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  y[i] = from_float<T>(x[i]);
  const uint32_t pair = pack2<T>(x[i], x[i ^ 1]);
  pairs[i] = pair;
  unpacked[2 * i] = unpack_low<T>(pair);
  unpacked[2 * i + 1] = unpack_high<T>(pair);
}
#endif

}  // namespace vlmops
