// sm_90a's way to move tiles: mbarrier, TMA, and the register budget of a warpgroup. Tiles lie in dynamic shared
// memory.
//
// One mbarrier for each stage of a ring says it is full, one says it is empty. The k-th use of a stage is phase k of
// both: wait(full, k % 2) before reading; the producer waits for the phase before, wait(empty, k % 2 ^ 1), which of a
// new barrier counts as complete.
#pragma once

#include "memory.cuh"
#include "platform.cuh"

namespace vlmops {

// A matrix as TMA sees it, made by the launch plan (cuda_plan.TensorMap). By value, const __grid_constant__.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// For `count` arrivals each phase. One thread makes it; mbarrier_fence and __syncthreads before its first use.
VLMOPS_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
#ifdef VLMOPS_SIMT
  vlmops_simt_mbarrier_init(barrier, static_cast<unsigned>(count));
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#endif
}
VLMOPS_DEVICE void mbarrier_fence() {
#ifdef VLMOPS_SIMT
  vlmops_simt_mbarrier_fence();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

VLMOPS_DEVICE void mbarrier_arrive(uint64_t* barrier) {
#ifdef VLMOPS_SIMT
  vlmops_simt_mbarrier_arrive(barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
// Arrives, and makes the phase wait for so many bytes of copies.
VLMOPS_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
#ifdef VLMOPS_SIMT
  vlmops_simt_mbarrier_arrive(barrier, static_cast<unsigned>(bytes));
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Until the phase of that parity is complete.
VLMOPS_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
#ifdef VLMOPS_SIMT
  vlmops_simt_mbarrier_wait(barrier, static_cast<unsigned>(parity));
#else
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}

// Makes this thread's writes to shared memory visible to wgmma and TMA.
VLMOPS_DEVICE void fence_async_proxy() {
#ifdef VLMOPS_SIMT
  vlmops_simt_fence_async_proxy();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

VLMOPS_DEVICE void tma_prefetch(const TensorMap& map) {
#ifndef VLMOPS_SIMT
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#else
  (void)map;
#endif
}

// Starts copying the map's box from (x, y), innermost first, to `shared`; what is outside the matrix becomes zeros. The
// barrier's phase gets the bytes of the whole box. One thread calls it.
VLMOPS_DEVICE void tma_load(void* shared, const TensorMap& map, uint64_t* barrier, int x, int y) {
#ifdef VLMOPS_SIMT
  vlmops_simt_tma_load(shared, &map, barrier, 2, x, y, 0);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
#endif
}
VLMOPS_DEVICE void tma_load(void* shared, const TensorMap& map, uint64_t* barrier, int x, int y, int z) {
#ifdef VLMOPS_SIMT
  vlmops_simt_tma_load(shared, &map, barrier, 3, x, y, z);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
#endif
}

// This warpgroup needs no more than N registers a thread, or wants N; all its warps call it.
template <int N>
VLMOPS_DEVICE void give_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers come by eights");
#ifndef VLMOPS_SIMT
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
VLMOPS_DEVICE void take_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "registers come by eights");
#ifndef VLMOPS_SIMT
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// The first address from p on that is a multiple of 1024: where a swizzled tile may begin.
template <class T>
VLMOPS_DEVICE T* swizzle_aligned(T* p) {
#ifdef VLMOPS_SIMT
  const uint32_t address = vlmops_simt_shared_address(p);
#else
  const uint32_t address = shared_address(p);
#endif
  return reinterpret_cast<T*>(reinterpret_cast<char*>(p) + ((0u - address) & 1023u));
}

}  // namespace vlmops
