// 16-bit floating point types of our own: two bytes, conversions, packed pairs.
//
// bf16 and fp16 are storage: arithmetic is done in float. Rounding is to nearest even; a NaN becomes 0x7fff, as PTX's
// cvt has it. Under the SIMT machine the conversions are bit arithmetic with the same results.
#pragma once

#include "platform.cuh"

namespace vlmops {

struct alignas(2) bf16 {
  uint16_t bits;
};
struct alignas(2) fp16 {
  uint16_t bits;
};

// N neighbouring elements that are loaded and stored as one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];
  VLMOPS_DEVICE_MEMBER T& operator[](int i) { return data[i]; }
  VLMOPS_DEVICE_MEMBER const T& operator[](int i) const { return data[i]; }
};

VLMOPS_DEVICE float to_float(float x) { return x; }

VLMOPS_DEVICE float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

VLMOPS_DEVICE float to_float(fp16 x) {
#ifdef VLMOPS_SIMT
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
  if (magnitude < 0x0400u) {  // zero, subnormal: an integer times 2^-24
    const float value = static_cast<float>(magnitude) * bits_float(0x33800000u);
    return sign != 0 ? -value : value;
  }
  return bits_float(sign | ((magnitude << 13) + 0x38000000u));  // exponent bias 15 -> 127
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#endif
}

namespace detail {

#ifdef VLMOPS_SIMT
VLMOPS_DEVICE uint16_t bf16_bits(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

VLMOPS_DEVICE uint16_t fp16_bits(float x) {
  const uint32_t u = float_bits(x), magnitude = u & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at 2^-24, the step of fp16's subnormals
    const float rounded = bits_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(rounded) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
#else
VLMOPS_DEVICE uint16_t bf16_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

VLMOPS_DEVICE uint16_t fp16_bits(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

// Per type: from_float<T>(x) and the packed pair, the low half first in memory.
template <class T>
struct Convert;

template <>
struct Convert<float> {
  VLMOPS_DEVICE_MEMBER static float from(float x) { return x; }
};

template <>
struct Convert<bf16> {
  VLMOPS_DEVICE_MEMBER static bf16 from(float x) { return {bf16_bits(x)}; }
  VLMOPS_DEVICE_MEMBER static uint32_t pack(float low, float high) {
#ifdef VLMOPS_SIMT
    return bf16_bits(low) | static_cast<uint32_t>(bf16_bits(high)) << 16;
#else
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
  }
};

template <>
struct Convert<fp16> {
  VLMOPS_DEVICE_MEMBER static fp16 from(float x) { return {fp16_bits(x)}; }
  VLMOPS_DEVICE_MEMBER static uint32_t pack(float low, float high) {
#ifdef VLMOPS_SIMT
    return fp16_bits(low) | static_cast<uint32_t>(fp16_bits(high)) << 16;
#else
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#endif
  }
};

}  // namespace detail

// float -> T, rounded to nearest even.
template <class T>
VLMOPS_DEVICE T from_float(float x) {
  return detail::Convert<T>::from(x);
}

// Two floats -> one 32-bit register of two T (bf16 or fp16), as the matrix instructions want them.
template <class T>
VLMOPS_DEVICE uint32_t pack2(float low, float high) {
  return detail::Convert<T>::pack(low, high);
}

// The two halves of a packed pair.
template <class T>
VLMOPS_DEVICE float unpack_low(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair & 0xffffu)});
}
template <class T>
VLMOPS_DEVICE float unpack_high(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace vlmops
