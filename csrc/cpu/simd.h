// One float vector over every instruction set.
//
// Each set brings the same names in its own namespace (vlmops::<isa>), so a kernel is written once:
//
//   Vec                       kLanes floats                Mask   kLanes booleans
//   zero() set1(s)            broadcast
//   load(p) store(p, v)       p: float*, BF16*, FP16* (load also uint8_t*); any alignment; converts
//   load_n(p, n) store_n(p, v, n)   first n lanes only (0 <= n <= kLanes); touches nothing past p + n; rest 0
//   a + b  a - b  a * b  a / b  -a
//   fma(a, b, c) a * b + c    fnma(a, b, c) c - a * b      (two roundings on `generic`, one elsewhere)
//   max(a, b) min(a, b)       if either is NaN: b or NaN, so a NaN given second stays
//   abs(a) sqrt(a) round(a)   round: to nearest even, |a| < 2^22
//   lt(a, b) le(a, b) eq(a, b) -> Mask (false for NaN)     select(m, a, b)  m ? a : b
//   any(m) all(m) first_n(n)  and_(m, m) or_(m, m) not_(m)
//   copysign(mag, sgn)        reduce_add(v) reduce_max(v)
//   scale2(p, n)              p * 2^n, n whole, |n| <= 252: overflows to inf, underflows to 0 or a subnormal
//   add_exponent(p, u)        p * 2^n where u = n + 1.5 * 2^23, by adding to the exponent bits: no range check, and a
//                             NaN stays one only if its low 9 bits are 0
//   swap_pairs(v)             (1, 0, 3, 2, ...)
//   split2(x, e)              x = m * 2^e, m in [sqrt(1/2), sqrt(2)); x > 0 and normal; returns m
//   transpose(r)              r[kLanes]: kLanes x kLanes floats in place (also moves 32-bit patterns unchanged)
//   round_bf16(v) round_fp16(v)     through the type and back
//
// Below, for every set: exp, log, tanh, erf within 1.4 ulp, sigmoid within 2.4 (largest error found over
// 4 million points of each range that matters, against float64).
//
// BF16 is rounded to nearest even and NaN stays NaN everywhere. avx512_bf16 flushes subnormals to zero.
#pragma once

#include "isa.h"

#ifndef VLMOPS_ISA
#define VLMOPS_ISA generic
#endif
#define VLMOPS_ISA_ID VLMOPS_CAT(VLMOPS_ISA_ID_, VLMOPS_ISA)
#define VLMOPS_INLINE static inline __attribute__((always_inline))

typedef __INT32_TYPE__ vlmops_i32;
typedef __UINT32_TYPE__ vlmops_u32;
typedef __UINT16_TYPE__ vlmops_u16;
typedef __UINT8_TYPE__ vlmops_u8;
typedef __INT64_TYPE__ vlmops_i64;

namespace vlmops {
struct BF16 {
  vlmops_u16 bits;
};
struct FP16 {
  vlmops_u16 bits;
};
}  // namespace vlmops

#if VLMOPS_ISA_ID == VLMOPS_ISA_ID_avx512 || VLMOPS_ISA_ID == VLMOPS_ISA_ID_avx512_bf16
#include "simd/avx512.h"
#elif VLMOPS_ISA_ID == VLMOPS_ISA_ID_avx2
#include "simd/avx2.h"
#elif VLMOPS_ISA_ID == VLMOPS_ISA_ID_neon
#include "simd/neon.h"
#else
#include "simd/generic.h"
#endif
#include "simd/math.h"
