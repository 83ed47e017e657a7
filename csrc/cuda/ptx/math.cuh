// Scalar functions of float. The *_fast forms are one hardware instruction (relative error about 2^-22 for exp2 and
// log2 away from 1, 2^-23 for rsqrt and reciprocal, 2^-11 for tanh) and flush subnormals; under the SIMT machine both
// forms are the C library's.
#pragma once

#include "platform.cuh"

namespace vlmops {

#ifdef VLMOPS_SIMT
VLMOPS_DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
VLMOPS_DEVICE float exp2_exact(float x) { return __builtin_exp2f(x); }
VLMOPS_DEVICE float exp2_fast(float x) { return __builtin_exp2f(x); }
VLMOPS_DEVICE float exp_exact(float x) { return __builtin_expf(x); }
VLMOPS_DEVICE float log2_exact(float x) { return __builtin_log2f(x); }
VLMOPS_DEVICE float log2_fast(float x) { return __builtin_log2f(x); }
VLMOPS_DEVICE float log_exact(float x) { return __builtin_logf(x); }
VLMOPS_DEVICE float tanh_exact(float x) { return __builtin_tanhf(x); }
VLMOPS_DEVICE float tanh_fast(float x) { return __builtin_tanhf(x); }
VLMOPS_DEVICE float erf_exact(float x) { return __builtin_erff(x); }
VLMOPS_DEVICE float rsqrt_exact(float x) { return 1.f / __builtin_sqrtf(x); }
VLMOPS_DEVICE float rsqrt_fast(float x) { return 1.f / __builtin_sqrtf(x); }
VLMOPS_DEVICE float sqrt_exact(float x) { return __builtin_sqrtf(x); }
VLMOPS_DEVICE float reciprocal_fast(float x) { return 1.f / x; }
VLMOPS_DEVICE float max_float(float a, float b) { return __builtin_fmaxf(a, b); }
VLMOPS_DEVICE float min_float(float a, float b) { return __builtin_fminf(a, b); }
VLMOPS_DEVICE float abs_float(float x) { return __builtin_fabsf(x); }
VLMOPS_DEVICE int round_to_int(float x) { return static_cast<int>(__builtin_rintf(x)); }  // ties to even
#else
VLMOPS_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
VLMOPS_DEVICE float exp2_exact(float x) { return exp2f(x); }
VLMOPS_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VLMOPS_DEVICE float exp_exact(float x) { return expf(x); }
VLMOPS_DEVICE float log2_exact(float x) { return log2f(x); }
VLMOPS_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VLMOPS_DEVICE float log_exact(float x) { return logf(x); }
VLMOPS_DEVICE float tanh_exact(float x) { return tanhf(x); }
VLMOPS_DEVICE float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VLMOPS_DEVICE float erf_exact(float x) { return erff(x); }
VLMOPS_DEVICE float rsqrt_exact(float x) { return 1.f / sqrtf(x); }
VLMOPS_DEVICE float rsqrt_fast(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VLMOPS_DEVICE float sqrt_exact(float x) { return sqrtf(x); }
VLMOPS_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VLMOPS_DEVICE float max_float(float a, float b) { return fmaxf(a, b); }
VLMOPS_DEVICE float min_float(float a, float b) { return fminf(a, b); }
VLMOPS_DEVICE float abs_float(float x) { return fabsf(x); }
VLMOPS_DEVICE int round_to_int(float x) { return __float2int_rn(x); }  // ties to even
#endif

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

VLMOPS_DEVICE float exp_fast(float x) { return exp2_fast(x * kLog2E); }
VLMOPS_DEVICE float sigmoid(float x) { return 1.f / (1.f + exp_exact(-x)); }
VLMOPS_DEVICE bool is_nan(float x) { return !(x == x); }

}  // namespace vlmops
