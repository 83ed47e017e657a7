// Picks the best compiled instruction set that this CPU has (bindings only; kernels never include this).
#pragma once

#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace vlmops {

enum class Isa : int { generic = 0, neon = 1, avx2 = 2, avx512 = 3, avx512_bf16 = 4 };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::neon: return "neon";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    default: return "generic";
  }
}

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if VLMOPS_HAVE_avx512_bf16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
#endif
#if VLMOPS_HAVE_avx512
  if (avx512) return Isa::avx512;
#endif
#if VLMOPS_HAVE_avx2
  if (avx2) return Isa::avx2;
#endif
  (void)avx512;
#elif defined(__aarch64__) && VLMOPS_HAVE_neon
  return Isa::neon;
#endif
  return Isa::generic;
}

// VLMOPS_CPU_ISA=avx2 caps the choice, so that one machine can test every set it has.
inline Isa current_isa() {
  static const Isa isa = [] {
    const Isa best = detect_isa();
    const char* cap = std::getenv("VLMOPS_CPU_ISA");
    if (cap == nullptr || *cap == '\0') return best;
    for (int i = 0; i <= static_cast<int>(best); ++i) {
      if (std::strcmp(cap, isa_name(static_cast<Isa>(i))) == 0) return static_cast<Isa>(i);
    }
    return best;
  }();
  return isa;
}

}  // namespace vlmops

#if VLMOPS_HAVE_neon
#define VLMOPS_CASE_neon(fn) \
  case ::vlmops::Isa::neon: return &::vlmops::neon::fn;
#else
#define VLMOPS_CASE_neon(fn)
#endif
#if VLMOPS_HAVE_avx2
#define VLMOPS_CASE_avx2(fn) \
  case ::vlmops::Isa::avx2: return &::vlmops::avx2::fn;
#else
#define VLMOPS_CASE_avx2(fn)
#endif
#if VLMOPS_HAVE_avx512
#define VLMOPS_CASE_avx512(fn) \
  case ::vlmops::Isa::avx512: return &::vlmops::avx512::fn;
#else
#define VLMOPS_CASE_avx512(fn)
#endif
#if VLMOPS_HAVE_avx512_bf16
#define VLMOPS_CASE_avx512_bf16(fn) \
  case ::vlmops::Isa::avx512_bf16: return &::vlmops::avx512_bf16::fn;
#else
#define VLMOPS_CASE_avx512_bf16(fn)
#endif

// VLMOPS_PICK(fn): pointer to the best compiled version of fn for this CPU.
#define VLMOPS_PICK(fn)                                                                                    \
  ([]() -> decltype(& ::vlmops::generic::fn) {                                                             \
    switch (::vlmops::current_isa()) {                                                                     \
      VLMOPS_CASE_neon(fn) VLMOPS_CASE_avx2(fn) VLMOPS_CASE_avx512(fn) VLMOPS_CASE_avx512_bf16(fn) default \
          : return &::vlmops::generic::fn;                                                                 \
    }                                                                                                      \
  }())
