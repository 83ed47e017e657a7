// The only file that knows what compiles it: nvcc, NVRTC, or g++ for the host SIMT machine (-DVLMOPS_SIMT).
#pragma once

#ifdef VLMOPS_SIMT
#include "simt/device.h"
#define VLMOPS_DEVICE        static inline __attribute__((always_inline))
#define VLMOPS_DEVICE_MEMBER inline __attribute__((always_inline))
#define VLMOPS_UNROLL
#define VLMOPS_UNROLL_N(n)
#define VLMOPS_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(vlmops_simt_dynamic_shared())
#else
#define VLMOPS_DEVICE        static __device__ __forceinline__
#define VLMOPS_DEVICE_MEMBER __device__ __forceinline__
#define VLMOPS_UNROLL        _Pragma("unroll")
#define VLMOPS_PRAGMA_(x)    _Pragma(#x)
#define VLMOPS_UNROLL_N(n)   VLMOPS_PRAGMA_(unroll n)
// Dynamic shared memory of the launch. One array per kernel; carve it up by hand.
#define VLMOPS_DYNAMIC_SHARED(T, name)                           \
  extern __shared__ __align__(128) char vlmops_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(vlmops_dynamic_shared)
#endif

// A kernel's head. The launch plan gives -DVLMOPS_NAME=<mangled name>, -DVLMOPS_THREADS=<threads per block> and
// -DVLMOPS_ENTRY_<entry>, which selects the one kernel of the file that is compiled:
//
//   #ifdef VLMOPS_ENTRY_rotary_forward
//   VLMOPS_KERNEL(rotary_forward)(const VLMOPS_T* x, int rows) { ... }
//   #endif
#define VLMOPS_KERNEL(entry) extern "C" __global__ void __launch_bounds__(VLMOPS_THREADS) VLMOPS_NAME
// The same, with at least `blocks` blocks resident per multiprocessor.
#define VLMOPS_KERNEL_RESIDENT(entry, blocks) \
  extern "C" __global__ void __launch_bounds__(VLMOPS_THREADS, blocks) VLMOPS_NAME

namespace vlmops {

// NVRTC has no <cstdint>; inside this namespace these names hide the standard ones everywhere.
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);  // NVRTC has no INFINITY
constexpr int kWarp = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

template <class T>
VLMOPS_DEVICE constexpr T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
VLMOPS_DEVICE constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
template <class T>
VLMOPS_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

VLMOPS_DEVICE uint32_t float_bits(float x) {
#ifdef VLMOPS_SIMT
  return __builtin_bit_cast(uint32_t, x);
#else
  return __float_as_uint(x);
#endif
}
VLMOPS_DEVICE float bits_float(uint32_t u) {
#ifdef VLMOPS_SIMT
  return __builtin_bit_cast(float, u);
#else
  return __uint_as_float(u);
#endif
}

}  // namespace vlmops
