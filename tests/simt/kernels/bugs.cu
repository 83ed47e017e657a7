// Small kernels that can be broken: the last argument says how, 0 is the correct form. See test_machine.py.
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/warp.cuh"

namespace vlmops {

VLMOPS_DEVICE int thread() { return static_cast<int>(threadIdx.x); }

#ifdef VLMOPS_ENTRY_barrier  // 1: no barrier before a neighbour's element is read; 2: none before it is overwritten
VLMOPS_KERNEL(barrier)(const float* x, float* y, int bug) {
  __shared__ float tile[VLMOPS_THREADS];
  const int t = thread();
  tile[t] = x[t];
  if (bug != 1) __syncthreads();
  const float neighbour = tile[(t + 1) % VLMOPS_THREADS];
  if (bug != 2) __syncthreads();
  tile[t] = neighbour * 2.f;
  y[t] = tile[t];
}
#endif

#ifdef VLMOPS_ENTRY_warp_barrier  // 1: lanes exchange through shared memory without __syncwarp
VLMOPS_KERNEL(warp_barrier)(const float* x, float* y, int bug) {
  __shared__ float tile[VLMOPS_THREADS];
  const int t = thread();
  tile[t] = x[t];
  if (bug != 1) __syncwarp();
  const float neighbour = tile[t ^ 1];
  y[t] = neighbour;
}
#endif

#ifdef VLMOPS_ENTRY_write_write  // 1: two threads write one element, the same value
VLMOPS_KERNEL(write_write)(const float* x, float* y, int bug) {
  __shared__ float one[VLMOPS_THREADS];
  const int t = thread();
  if (bug == 1) {
    one[t / 2] = 1.f;
  } else {
    one[t] = 1.f;
  }
  __syncthreads();
  y[t] = x[t] * one[t / 2];
}
#endif

#ifdef VLMOPS_ENTRY_readers  // some read one element, then thread 0 writes it, after a shuffle, which orders nothing.
                             // 1: all read; 2: one lane of each warp reads
VLMOPS_KERNEL(readers)(const float* x, float* y, int bug) {
  __shared__ float one;
  const int t = thread();
  if (t == 0) one = x[0];
  __syncthreads();
  const float value = bug != 2 || t % kWarp == 0 ? one : 0.f;
  y[t] = shfl(value, 0);
  if (bug == 0) __syncthreads();
  if (t == 0) one = value + 1.f;
}
#endif

#ifdef VLMOPS_ENTRY_blocks  // 1: blocks write one element; 2: one reads what another wrote; 3: the reverse
VLMOPS_KERNEL(blocks)(float* x, float* y, int bug) {
  const int t = thread(), block = static_cast<int>(blockIdx.x), i = block * VLMOPS_THREADS + t;
  if (bug == 1) {
    y[t] = 1.f;
  } else if (bug == 2) {
    y[i] = 1.f;
    x[i] = y[t];
  } else if (bug == 3) {
    y[i] = x[t];
    if (block == 2) x[t] = 0.f;
  } else {
    y[i] = x[i];
    if (t == 0) atomic_add(x + i, 1.f);
  }
}
#endif

#ifdef VLMOPS_ENTRY_atomics  // 1: one block does not use the atomic
VLMOPS_KERNEL(atomics)(float* sum, const float* x, int bug) {
  if (bug == 1 && blockIdx.x == 1 && threadIdx.x == 0) {
    sum[0] += x[0];
    return;
  }
  atomic_add(sum, x[thread()]);
}
#endif

#ifdef VLMOPS_ENTRY_last_block  // the last block sums all; 1: no fence before the atomic; 2: no atomic; 3: no barrier
VLMOPS_KERNEL(last_block)(const float* x, float* partial, float* y, int* arrived, int bug) {
  __shared__ int last;
  const int t = thread(), blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  partial[block * VLMOPS_THREADS + t] = 2.f * x[block * VLMOPS_THREADS + t];
  if (bug != 3) __syncthreads();
  if (t == 0) {
    if (bug != 1) fence_device();
    last = (bug == 2 ? block : atomic_add(arrived, 1)) == blocks - 1;
  }
  __syncthreads();
  if (last == 0) return;
  float sum = 0.f;
  for (int b = 0; b < blocks; ++b) sum += partial[b * VLMOPS_THREADS + t];
  y[t] = sum;
}
#endif

#ifdef VLMOPS_ENTRY_uninitialised  // 1: shared memory nobody wrote; 2: global memory nobody wrote; 3: by an atomic
VLMOPS_KERNEL(uninitialised)(const float* x, float* y, int bug) {
  __shared__ float tile[VLMOPS_THREADS];
  const int t = thread();
  if (bug != 1 || t < 40) tile[t] = x[t];
  __syncthreads();
  if (bug == 2) {
    if (t == 3) tile[t] = y[t];
  } else if (bug == 3)
    if (t == 3) atomic_add(y + t, 1.f);
  y[t] = tile[t];
}
#endif

#ifdef VLMOPS_ENTRY_bounds  // n elements. 1: reads on; 2: writes on; 3: past a shared array; 4: before; 5: past dynamic
                            // memory; 6: a vector half outside; 7: null; 8: another thread's variable
VLMOPS_KERNEL(bounds)(const float* x, float* y, int n, float* nothing, int bug) {
  VLMOPS_DYNAMIC_SHARED(float, dynamic);
  __shared__ float tile[VLMOPS_THREADS];
  __shared__ uint64_t leak;
  const int t = thread();
  float value = t < n ? x[t] : 0.f;
  tile[t] = value;
  dynamic[t] = value;
  if (bug == 1) {
    value = x[t];
  } else if (bug == 2) {
    y[t] = value;
  } else if (bug == 3) {
    tile[t + 1] = value;
  } else if (bug == 4) {
    value = x[t - 1];
  } else if (bug == 5) {
    dynamic[t + 1] = value;
  } else if (bug == 6) {
    if (t % 4 == 0) value = load_vec<4>(x + t)[0];
  } else if (bug == 7) {
    if (t == 1) value = nothing[t];
  } else if (bug == 8) {
    if (t == 0) leak = reinterpret_cast<uint64_t>(&value);
    __syncthreads();
    if (t == 5) value = *reinterpret_cast<float*>(leak);
  }
  if (t < n) y[t] = value;
}
#endif

#ifdef VLMOPS_ENTRY_alignment  // 1: a 16-byte load at 4 bytes; 2: an 8-byte store; 3: in shared memory; 4: cp.async's
                               // source
VLMOPS_KERNEL(alignment)(const float* x, float* y, int bug) {
  __shared__ float tile[4 * VLMOPS_THREADS + 4];
  const int t = thread();
  cp_async16(tile + 4 * t, x + 4 * t + (bug == 4 ? 1 : 0), true);
  cp_async_commit();
  cp_async_wait_group<0>();
  if (t == 0) store_vec(tile + 4 * VLMOPS_THREADS, load_vec<4>(x));
  __syncthreads();
  auto v = load_vec<4>(x + 4 * t + (bug == 1 ? 1 : 0));
  v = load_vec<4>(tile + 4 * t + (bug == 3 ? 2 : 0));
  Vec<float, 2> half{v[0], v[1]};
  store_vec(y + 4 * t + (bug == 2 ? 1 : 0), half);
  half[0] = v[2], half[1] = v[3];
  store_vec(y + 4 * t + 2, half);
}
#endif

#ifdef VLMOPS_ENTRY_divergence  // 1: a shuffle of half the lanes; 2: two collectives; 3: a partial mask; 4: lanes have
                                // ended; 5: one collective, two lines
VLMOPS_KERNEL(divergence)(const float* x, float* y, int bug) {
  const int t = thread();
  float value = x[t];
  if (bug == 1) {
    if (t % 32 < 16) value = shfl_xor(value, 1);
  } else if (bug == 2) {
    if (t % 32 < 16) {
      value = shfl_xor(value, 1);
    } else {
      value = static_cast<float>(ballot(value > 0.f));
    }
  } else if (bug == 3) {
    if (t % 32 < 16) value = __shfl_xor_sync(0x0000ffffu, value, 1);
  } else if (bug == 4) {
    if (t % 32 == 31) return;
    value = shfl_xor(value, 1);
  } else if (bug == 5) {
    if (t % 32 < 16) {
      __syncwarp();
    } else {
      __syncwarp();
    }
  } else {
    value = shfl_xor(value, 1);
    __syncwarp();
  }
  y[t] = value;
}
#endif

#ifdef VLMOPS_ENTRY_deadlock  // 1: a warp ended; 2: a lane ended; 3: a barrier in a branch of a warp; 4: barriers of
                              // two lines
VLMOPS_KERNEL(deadlock)(const float* x, float* y, int bug) {
  const int t = thread();
  y[t] = x[t];
  if (bug == 1) {
    if (t >= 32) return;
  } else if (bug == 2) {
    if (t == 7) return;
  } else if (bug == 3) {
    if (t < 32) __syncthreads();
  } else if (bug == 4) {
    if (t < 32) {
      __syncthreads();
      y[t] = 1.f;
      return;
    }
  }
  __syncthreads();
}
#endif

#ifdef VLMOPS_ENTRY_async  // 1: no wait; 2: no commit; 3: a wait for too few; 4: no barrier after the wait; 5: a store
                           // meanwhile; 6: ends without a wait; 7: a destination still being read; 8: global
                           // destination
VLMOPS_KERNEL(async)(const float* x, float* y, int bug) {
  __shared__ float tile[2][4 * VLMOPS_THREADS];
  const int t = thread(), other = (t + 1) % VLMOPS_THREADS;
  cp_async16(tile[0] + 4 * t, x + 4 * t, t % 2 == 0);
  if (bug == 8) cp_async16(y + 4 * t, x + 4 * t, true);
  if (bug != 2) cp_async_commit();
  cp_async16(tile[1] + 4 * t, x + 4 * t, true);
  if (bug == 5) tile[1][4 * t] = 1.f;
  if (bug != 2) cp_async_commit();
  if (bug == 3) {
    cp_async_wait_group<1>();
  } else if (bug != 1 && bug != 6) cp_async_wait_group<0>();
  if (bug != 4) __syncthreads();
  if (bug == 6) {
    y[4 * t] = x[4 * t];
  } else {
    store_vec(y + 4 * t, load_vec<4>(tile[1] + 4 * other));
  }
  if (bug == 7) {
    cp_async16(tile[1] + 4 * t, x + 4 * t, true);
    cp_async_commit();
    cp_async_wait_group<0>();
  }
}
#endif

#ifdef VLMOPS_ENTRY_ldmatrix  // 1: a row at 8 bytes; 2: a row past the end; 3: global memory; 4: rows nobody wrote
VLMOPS_KERNEL(ldmatrix)(const bf16* x, uint32_t* y, int bug) {
  __shared__ bf16 tile[32][8];
  const int t = thread();
  if (bug != 4 || t < 31) store_vec(tile[t], load_vec<8>(x + 8 * t));
  __syncthreads();
  uint32_t r[4];
  if (bug == 1) {
    ldmatrix_x4(r, &tile[t % 8][4]);
  } else if (bug == 2) {
    ldmatrix_x4(r, tile[0] + 8 * (t + 1));
  } else if (bug == 3) {
    ldmatrix_x4(r, x + 8 * t);
  } else {
    ldmatrix_x4(r, tile[t]);
  }
  for (int i = 0; i < 4; ++i) y[4 * t + i] = r[i];
}
#endif

#ifdef VLMOPS_ENTRY_hang  // 1: waits for a flag that a later thread sets
VLMOPS_KERNEL(hang)(int* flag, float* y, int bug) {
  if (bug == 1) {
    while (*static_cast<volatile int*>(flag) == 0) {
    }
  }
  y[thread()] = 1.f;
  if (threadIdx.x == 63) atomic_add(flag, 1);
}
#endif

}  // namespace vlmops
