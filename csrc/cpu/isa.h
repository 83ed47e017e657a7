// Instruction sets: every kernel file is compiled once per set, with VLMOPS_ISA naming the set.
//
// A kernel file includes neither torch nor the C++ standard library: an inline function shared with a
// baseline object could otherwise be emitted with AVX-512 instructions and be picked by the linker for
// everybody. It sees raw pointers and the compiler's own intrinsics only.
#pragma once

#define VLMOPS_CAT_(a, b) a##b
#define VLMOPS_CAT(a, b)  VLMOPS_CAT_(a, b)

// The order is the order of preference: a later set is never slower where the CPU has it.
#define VLMOPS_ISA_ID_generic     0
#define VLMOPS_ISA_ID_neon        1
#define VLMOPS_ISA_ID_avx2        2
#define VLMOPS_ISA_ID_avx512      3
#define VLMOPS_ISA_ID_avx512_bf16 4

// DECLARE(ret, name, args): declares name in the namespace of every instruction set this build carries.
// The build passes VLMOPS_HAVE_<isa>=1 for each set the compiler could target.
#if VLMOPS_HAVE_neon
#define VLMOPS_DECLARE_neon(ret, name, ...) \
  namespace neon {                          \
  ret name(__VA_ARGS__);                    \
  }
#else
#define VLMOPS_DECLARE_neon(ret, name, ...)
#endif
#if VLMOPS_HAVE_avx2
#define VLMOPS_DECLARE_avx2(ret, name, ...) \
  namespace avx2 {                          \
  ret name(__VA_ARGS__);                    \
  }
#else
#define VLMOPS_DECLARE_avx2(ret, name, ...)
#endif
#if VLMOPS_HAVE_avx512
#define VLMOPS_DECLARE_avx512(ret, name, ...) \
  namespace avx512 {                          \
  ret name(__VA_ARGS__);                      \
  }
#else
#define VLMOPS_DECLARE_avx512(ret, name, ...)
#endif
#if VLMOPS_HAVE_avx512_bf16
#define VLMOPS_DECLARE_avx512_bf16(ret, name, ...) \
  namespace avx512_bf16 {                          \
  ret name(__VA_ARGS__);                           \
  }
#else
#define VLMOPS_DECLARE_avx512_bf16(ret, name, ...)
#endif

#define VLMOPS_DECLARE(ret, name, ...)                                                                 \
  namespace vlmops {                                                                                   \
  namespace generic {                                                                                  \
  ret name(__VA_ARGS__);                                                                               \
  }                                                                                                    \
  VLMOPS_DECLARE_neon(ret, name, __VA_ARGS__) VLMOPS_DECLARE_avx2(ret, name, __VA_ARGS__)              \
      VLMOPS_DECLARE_avx512(ret, name, __VA_ARGS__) VLMOPS_DECLARE_avx512_bf16(ret, name, __VA_ARGS__) \
  }

// Element types as they cross the boundary between bindings and kernels.
namespace vlmops {
enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kUInt8 = 3 };
}
