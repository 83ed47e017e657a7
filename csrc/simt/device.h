// What a kernel sees when g++ compiles it for the host SIMT machine: CUDA's words, and the machine's entry points.
//
// A kernel unit is compiled with -fsanitize=thread, so every access to memory that is not a private variable first
// calls one of the __tsan_* hooks, which the machine defines (hooks.cpp). Collectives switch to the machine until all
// lanes of the warp, or all threads of the block, have arrived.
#pragma once

#define VLMOPS_SIMT_API extern "C" __attribute__((visibility("default")))

namespace vlmops::simt {

struct Index {
  unsigned x, y, z;
};

}  // namespace vlmops::simt

// Constant during a thread's life, hence __attribute__((const)): the compiler may ask once.
VLMOPS_SIMT_API vlmops::simt::Index vlmops_simt_thread_index() __attribute__((const));
VLMOPS_SIMT_API vlmops::simt::Index vlmops_simt_block_index() __attribute__((const));
VLMOPS_SIMT_API vlmops::simt::Index vlmops_simt_block_size() __attribute__((const));
VLMOPS_SIMT_API vlmops::simt::Index vlmops_simt_grid_size() __attribute__((const));
VLMOPS_SIMT_API int vlmops_simt_lane() __attribute__((const));
VLMOPS_SIMT_API void* vlmops_simt_dynamic_shared() __attribute__((const));

// A site is the line of a collective in the kernel's source: lanes that wait at different lines have diverged.
VLMOPS_SIMT_API void vlmops_simt_sync_block(const char* file, int line);
VLMOPS_SIMT_API void vlmops_simt_sync_warp(unsigned mask, const char* file, int line);
VLMOPS_SIMT_API unsigned vlmops_simt_shuffle(unsigned mask, unsigned value, int source, const char* file, int line);
VLMOPS_SIMT_API unsigned vlmops_simt_ballot(unsigned mask, bool predicate, const char* file, int line);

VLMOPS_SIMT_API void vlmops_simt_load(void* registers, const void* memory, unsigned bytes);
VLMOPS_SIMT_API void vlmops_simt_store(void* memory, const void* registers, unsigned bytes);
VLMOPS_SIMT_API float vlmops_simt_atomic_add_float(float* memory, float value);
VLMOPS_SIMT_API int vlmops_simt_atomic_add_int(int* memory, int value);
VLMOPS_SIMT_API void vlmops_simt_fence();

VLMOPS_SIMT_API void vlmops_simt_cp_async(void* shared, const void* global, unsigned bytes, bool valid);
VLMOPS_SIMT_API void vlmops_simt_cp_async_commit();
VLMOPS_SIMT_API void vlmops_simt_cp_async_wait(int groups);

VLMOPS_SIMT_API void vlmops_simt_ldmatrix(unsigned* registers, const void* row, int matrices, bool transposed,
                                          const char* file = __builtin_FILE(), int line = __builtin_LINE());
VLMOPS_SIMT_API void vlmops_simt_mma_m16n8k16(float* c, const unsigned* a, unsigned b0, unsigned b1, bool bfloat16,
                                              const char* file = __builtin_FILE(), int line = __builtin_LINE());

// hopper.cpp, products.cpp
VLMOPS_SIMT_API void vlmops_simt_mbarrier_init(void* barrier, unsigned count);
VLMOPS_SIMT_API void vlmops_simt_mbarrier_fence();
VLMOPS_SIMT_API void vlmops_simt_mbarrier_arrive(void* barrier, unsigned bytes);
VLMOPS_SIMT_API void vlmops_simt_mbarrier_wait(void* barrier, unsigned parity, const char* file = __builtin_FILE(),
                                               int line = __builtin_LINE());
VLMOPS_SIMT_API void vlmops_simt_fence_async_proxy();
VLMOPS_SIMT_API unsigned vlmops_simt_shared_address(const void* shared);
VLMOPS_SIMT_API void vlmops_simt_tma_load(void* shared, const void* map, void* barrier, int rank, int x, int y, int z);
VLMOPS_SIMT_API void vlmops_simt_wgmma(float* d, const unsigned* a, unsigned long long a_descriptor,
                                       unsigned long long b_descriptor, int n, bool accumulate, bool transposed,
                                       bool bfloat16, const char* file = __builtin_FILE(), int line = __builtin_LINE());
VLMOPS_SIMT_API void vlmops_simt_wgmma_fence();
VLMOPS_SIMT_API void vlmops_simt_wgmma_commit();
VLMOPS_SIMT_API void vlmops_simt_wgmma_wait(int groups, const char* file = __builtin_FILE(),
                                            int line = __builtin_LINE());

#define __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Blocks run one after another, so a static variable is a block's own. `used`: never folded away.
#define __shared__ static __constinit __attribute__((aligned(128), used))

#define threadIdx (vlmops_simt_thread_index())
#define blockIdx  (vlmops_simt_block_index())
#define blockDim  (vlmops_simt_block_size())
#define gridDim   (vlmops_simt_grid_size())

#define VLMOPS_SIMT_INLINE static inline __attribute__((always_inline))
#define VLMOPS_SIMT_SITE   const char *file = __builtin_FILE(), int line = __builtin_LINE()

VLMOPS_SIMT_INLINE void __syncthreads(VLMOPS_SIMT_SITE) { vlmops_simt_sync_block(file, line); }
VLMOPS_SIMT_INLINE void __syncwarp(unsigned mask = 0xffffffffu, VLMOPS_SIMT_SITE) {
  vlmops_simt_sync_warp(mask, file, line);
}
VLMOPS_SIMT_INLINE unsigned __ballot_sync(unsigned mask, bool predicate, VLMOPS_SIMT_SITE) {
  return vlmops_simt_ballot(mask, predicate, file, line);
}
template <class T>
VLMOPS_SIMT_INLINE T __shfl_sync(unsigned mask, T value, int source, VLMOPS_SIMT_SITE) {
  const unsigned out = vlmops_simt_shuffle(mask, __builtin_bit_cast(unsigned, value), source & 31, file, line);
  return __builtin_bit_cast(T, out);
}
template <class T>
VLMOPS_SIMT_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, VLMOPS_SIMT_SITE) {
  return __shfl_sync(mask, value, vlmops_simt_lane() ^ lanes, file, line);
}
template <class T>
VLMOPS_SIMT_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, VLMOPS_SIMT_SITE) {
  const int lane = vlmops_simt_lane(), source = lane + static_cast<int>(delta);
  return __shfl_sync(mask, value, source < 32 ? source : lane, file, line);
}
template <class T>
VLMOPS_SIMT_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, VLMOPS_SIMT_SITE) {
  const int lane = vlmops_simt_lane(), source = lane - static_cast<int>(delta);
  return __shfl_sync(mask, value, source >= 0 ? source : lane, file, line);
}
