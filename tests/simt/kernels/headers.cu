// Every function of the device headers, for the compilers; the scalar functions with results. See test_headers.py.
#include "mma/sm80.cuh"
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"

namespace vlmops {

#ifdef VLMOPS_ENTRY_math  // y [13, n]: the functions of x [n], exact and fast
VLMOPS_KERNEL(math)(const float* x, float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const float v = x[i], positive = abs_float(v);
  float* out = y + i;
  const auto put = [&](float value) {
    *out = value;
    out += n;
  };
  put(exp2_exact(v)), put(exp2_fast(v)), put(exp_exact(v)), put(exp_fast(v));
  put(log2_exact(positive)), put(log2_fast(positive)), put(log_exact(positive));
  put(tanh_exact(v)), put(tanh_fast(v)), put(erf_exact(v)), put(sigmoid(v));
  put(rsqrt_exact(positive)), put(rsqrt_fast(positive)), put(sqrt_exact(positive)), put(reciprocal_fast(v));
  put(fma(v, v, -1.f)), put(max_float(v, kInfinity - kInfinity)), put(min_float(v, 0.5f));
  put(static_cast<float>(round_to_int(v * 4.f)));
  put(is_nan(v) ? 1.f : 0.f);
}
#endif

#ifdef VLMOPS_ENTRY_every
template <class T>
VLMOPS_DEVICE void use_all(T* g, float* f, int* n) {
  VLMOPS_DYNAMIC_SHARED(T, tile);
  __shared__ float part[kWarp];
  cp_async16(tile, g, true);
  cp_async<8>(tile + 8, g, n[1] > 0);
  cp_async<4>(tile + 16, g, true);
  cp_async_commit();
  cp_async_wait_group<1>();
  cp_async_wait_group<0>();
  __syncthreads();
  uint32_t a[4], b[4], d[2], e[2];
  float c[4] = {};
  ldmatrix_x4(a, tile + lane_id() * 8);
  ldmatrix_x4_trans(b, tile + lane_id() * 8);
  ldmatrix_x2(d, tile);
  ldmatrix_x2_trans(e, tile);
  mma_m16n8k16<T>(c, a, b[0], b[1]);
  mma_m16n8k16<T>(c, a, d[0], e[1]);
  Vec<T, 8> v = load_vec<8>(g);
  const auto w = load_vec_readonly<4>(g);
  float s = to_float(v[0]) + to_float(w[1]) + to_float(load_vec<1>(g)[0]) + to_float(load_vec<2>(g)[1]);
  store_pair(g, pack2<T>(s, c[1]));
  s += unpack_low<T>(load_pair(g + 2)) + unpack_high<T>(load_pair(g + 4));
  v[1] = from_float<T>(s);
  store_vec(g + 8, v);
  part[lane_id()] = s;
  __syncwarp();
  s = warp_sum(s) + warp_max(s) + warp_sum<8>(part[3]) + static_cast<float>(warp_max(n[0]));
  s += shfl(s, 1) + shfl_down(s, 2) + shfl_up(s, 1) + shfl_xor(s, 4);
  if (warp_any(s > 0.f) && warp_all(s < 3.f) && ballot(s > 1.f) == 7u) s = -kInfinity;
  f[ceil_div(min_of(n[0], n[1]), max_of(n[2], 3))] = s + static_cast<float>(warp_id());
  atomic_add(f, s);
  fence_device();
  atomic_add(n, 1);
}

VLMOPS_KERNEL_RESIDENT(every, 2)(bf16* b, fp16* h, float* f, int* n) {
  use_all(b, f, n);
  use_all(h, f, n);
}
#endif

}  // namespace vlmops
