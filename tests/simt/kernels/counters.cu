// Accesses of known cost. See test_counters.py.
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"

namespace vlmops {

#ifdef VLMOPS_ENTRY_copy  // y[i] = x[offset + i * stride]
VLMOPS_KERNEL(copy)(const VLMOPS_T* x, VLMOPS_T* y, int offset, int stride) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  y[i] = x[offset + i * stride];
}
#endif

#ifdef VLMOPS_ENTRY_copy_vec  // N elements an access
VLMOPS_KERNEL(copy_vec)(const VLMOPS_T* x, VLMOPS_T* y) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  store_vec(y + i * VLMOPS_N, load_vec<VLMOPS_N>(x + i * VLMOPS_N));
}
#endif

#ifdef VLMOPS_ENTRY_shared  // lane i accesses N floats at i % 8 * stride + i / 8 * next
VLMOPS_KERNEL(shared)(int stride, int next) {
  VLMOPS_DYNAMIC_SHARED(float, tile);
  const int t = static_cast<int>(threadIdx.x);
  store_vec(tile + t % 8 * stride + t / 8 * next, Vec<float, VLMOPS_N>{});
}
#endif

#ifdef VLMOPS_ENTRY_ragged  // lanes do different things: lane i loads i % 4 elements, then one that all load
VLMOPS_KERNEL(ragged)(const float* x, float* y) {
  const int t = static_cast<int>(threadIdx.x);
  float sum = 0.f;
  for (int i = 0; i < t % 4; ++i) sum += x[32 * i + t];
  if (t % 2 == 1) sum += x[96 + t];
  y[t] = sum + x[128 + t];
}
#endif

#ifdef VLMOPS_ENTRY_collectives
VLMOPS_KERNEL(collectives)(float* y) {
  const int t = static_cast<int>(threadIdx.x);
  float sum = warp_sum(static_cast<float>(t));
  sum += warp_max(static_cast<float>(t));
  sum += static_cast<float>(shfl(t, 3) + shfl_down(t, 1) + shfl_up(t, 2));
  if (warp_any(t == 40)) sum += 1000.f;
  __syncwarp();
  __syncthreads();
  y[t] = sum;
}
#endif

}  // namespace vlmops
