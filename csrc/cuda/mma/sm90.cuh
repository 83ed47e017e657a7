// wgmma.mma_async m64nNk16: D[64, N] (+)= A[64, 16] B[16, N], 16-bit inputs, float accumulation. Four warps.
//
// Of warp w (of four), lane 4 g + t: d[j][2 h + e] is D(16 w + g + 8 h, 8 j + 2 t + e); a[h + 2 c] holds
// A(16 w + g + 8 h, 8 c + 2 t) and the one right of it. A warp's part is laid out as in mma.m16n8k16 (sm80.cuh).
//
// Tiles in shared memory have rows of 128 bytes in the 128-byte swizzle, as TMA writes them, 1024 bytes for 8 rows.
//   wgmma_fence(); wgmma(...); ...; wgmma_commit(); wgmma_wait<0>();  // then d may be used
#pragma once

#include "../ptx/memory.cuh"
#include "../ptx/platform.cuh"
#include "../ptx/types.cuh"

namespace vlmops {

// A tile whose rows run along k (64 elements), the rows of A, or the columns of B. `at`: its first row; plus 32 bytes
// for each step of 16 along k. `leading` matters where rows run along n instead: from 64 columns to the next 64, in
// bytes; there `at` moves by 2048 bytes (16 rows) for each step along k.
VLMOPS_DEVICE uint64_t tile_descriptor(const void* at, int leading = 1024) {
#ifdef VLMOPS_SIMT
  const uint32_t address = vlmops_simt_shared_address(at);
#else
  const uint32_t address = shared_address(at);
#endif
  return static_cast<uint64_t>(address >> 4 & 0x3fffu) | static_cast<uint64_t>(leading >> 4) << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Before the first product, and after accumulators or a were written by other instructions.
VLMOPS_DEVICE void wgmma_fence() {
#ifdef VLMOPS_SIMT
  vlmops_simt_wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
VLMOPS_DEVICE void wgmma_commit() {
#ifdef VLMOPS_SIMT
  vlmops_simt_wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most N groups are under way.
template <int N>
VLMOPS_DEVICE void wgmma_wait() {
#ifdef VLMOPS_SIMT
  vlmops_simt_wgmma_wait(N);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#endif
}
// Keeps the compiler from moving a use of d to before here.
template <int N>
VLMOPS_DEVICE void wgmma_keep(float (&d)[N][4]) {
#ifndef VLMOPS_SIMT
  VLMOPS_UNROLL
  for (int i = 0; i < N; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
#else
  (void)d;
#endif
}

#ifdef VLMOPS_SIMT
namespace detail {
VLMOPS_DEVICE constexpr bool is_bf16(bf16) { return true; }
VLMOPS_DEVICE constexpr bool is_bf16(fp16) { return false; }
}  // namespace detail
#else
namespace detail {

template <int N, class T>
struct Wgmma;  // of N columns

#define VLMOPS_UNWRAP(...) __VA_ARGS__
#define VLMOPS_D4(i)       "+f"(d[(i) / 4][0]), "+f"(d[(i) / 4][1]), "+f"(d[(i) / 4][2]), "+f"(d[(i) / 4][3])
#define VLMOPS_D8(i)       VLMOPS_D4(i), VLMOPS_D4(i + 4)
#define VLMOPS_D32(i)      VLMOPS_D8(i), VLMOPS_D8(i + 8), VLMOPS_D8(i + 16), VLMOPS_D8(i + 24)

// N columns, their registers' names and operands, and the numbers of the operands that follow.
#define VLMOPS_WGMMA(N, NAMES, REGISTERS, P0, P1, P2, P3, P4, P5, P6, T, TYPE)                                        \
  template <>                                                                                                         \
  struct Wgmma<N, T> {                                                                                                \
    template <bool AlongN>                                                                                            \
    VLMOPS_DEVICE_MEMBER static void run(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {             \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" P2                                                        \
                   ", 0;\n\t"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, %" P0 ", %" P1      \
                   ", p, 1, 1, 0, %" P3 ";\n\t}"                                                                      \
                   : VLMOPS_UNWRAP REGISTERS                                                                          \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(AlongN ? 1 : 0));                         \
    }                                                                                                                 \
    template <bool AlongN>                                                                                            \
    VLMOPS_DEVICE_MEMBER static void run(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" P5                                                        \
                   ", 0;\n\t"                                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, {%" P0 ", %" P1     \
                   ", %" P2 ", %" P3 "}, %" P4 ", p, 1, 1, %" P6 ";\n\t}"                                             \
                   : VLMOPS_UNWRAP REGISTERS                                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),           \
                     "n"(AlongN ? 1 : 0));                                                                            \
    }                                                                                                                 \
  };
#define VLMOPS_NAMES32                                                   \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define VLMOPS_REGISTERS32 VLMOPS_D32(0)
#define VLMOPS_NAMES36     VLMOPS_NAMES32 ", %32, %33, %34, %35"
#define VLMOPS_REGISTERS36 VLMOPS_D32(0), VLMOPS_D4(32)
#define VLMOPS_NAMES40     VLMOPS_NAMES36 ", %36, %37, %38, %39"
#define VLMOPS_REGISTERS40 VLMOPS_D32(0), VLMOPS_D8(32)
#define VLMOPS_NAMES44     VLMOPS_NAMES40 ", %40, %41, %42, %43"
#define VLMOPS_REGISTERS44 VLMOPS_D32(0), VLMOPS_D8(32), VLMOPS_D4(40)
#define VLMOPS_NAMES48     VLMOPS_NAMES44 ", %44, %45, %46, %47"
#define VLMOPS_REGISTERS48 VLMOPS_D32(0), VLMOPS_D8(32), VLMOPS_D8(40)
#define VLMOPS_NAMES64 VLMOPS_NAMES48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VLMOPS_REGISTERS64 VLMOPS_D32(0), VLMOPS_D32(32)
#define VLMOPS_NAMES128                                                                          \
  VLMOPS_NAMES64                                                                                 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define VLMOPS_REGISTERS128 VLMOPS_D32(0), VLMOPS_D32(32), VLMOPS_D32(64), VLMOPS_D32(96)
VLMOPS_WGMMA(64, VLMOPS_NAMES32, (VLMOPS_REGISTERS32), "32", "33", "34", "35", "36", "37", "38", bf16, "bf16")
VLMOPS_WGMMA(64, VLMOPS_NAMES32, (VLMOPS_REGISTERS32), "32", "33", "34", "35", "36", "37", "38", fp16, "f16")
VLMOPS_WGMMA(72, VLMOPS_NAMES36, (VLMOPS_REGISTERS36), "36", "37", "38", "39", "40", "41", "42", bf16, "bf16")
VLMOPS_WGMMA(72, VLMOPS_NAMES36, (VLMOPS_REGISTERS36), "36", "37", "38", "39", "40", "41", "42", fp16, "f16")
VLMOPS_WGMMA(80, VLMOPS_NAMES40, (VLMOPS_REGISTERS40), "40", "41", "42", "43", "44", "45", "46", bf16, "bf16")
VLMOPS_WGMMA(80, VLMOPS_NAMES40, (VLMOPS_REGISTERS40), "40", "41", "42", "43", "44", "45", "46", fp16, "f16")
VLMOPS_WGMMA(88, VLMOPS_NAMES44, (VLMOPS_REGISTERS44), "44", "45", "46", "47", "48", "49", "50", bf16, "bf16")
VLMOPS_WGMMA(88, VLMOPS_NAMES44, (VLMOPS_REGISTERS44), "44", "45", "46", "47", "48", "49", "50", fp16, "f16")
VLMOPS_WGMMA(96, VLMOPS_NAMES48, (VLMOPS_REGISTERS48), "48", "49", "50", "51", "52", "53", "54", bf16, "bf16")
VLMOPS_WGMMA(96, VLMOPS_NAMES48, (VLMOPS_REGISTERS48), "48", "49", "50", "51", "52", "53", "54", fp16, "f16")
VLMOPS_WGMMA(128, VLMOPS_NAMES64, (VLMOPS_REGISTERS64), "64", "65", "66", "67", "68", "69", "70", bf16, "bf16")
VLMOPS_WGMMA(128, VLMOPS_NAMES64, (VLMOPS_REGISTERS64), "64", "65", "66", "67", "68", "69", "70", fp16, "f16")
VLMOPS_WGMMA(256, VLMOPS_NAMES128, (VLMOPS_REGISTERS128), "128", "129", "130", "131", "132", "133", "134", bf16, "bf16")
VLMOPS_WGMMA(256, VLMOPS_NAMES128, (VLMOPS_REGISTERS128), "128", "129", "130", "131", "132", "133", "134", fp16, "f16")

#undef VLMOPS_WGMMA
}  // namespace detail
#endif

// d (+)= A B; A and B of descriptors. AlongN: the rows of B's tile run along n. The same call in all four warps.
template <int N, class T, bool AlongN = false>
VLMOPS_DEVICE void wgmma(float (&d)[N / 8][4], uint64_t a, uint64_t b, bool accumulate) {
#ifdef VLMOPS_SIMT
  vlmops_simt_wgmma(d[0], nullptr, a, b, N, accumulate, AlongN, detail::is_bf16(T{}));
#else
  detail::Wgmma<N, T>::template run<AlongN>(d, a, b, accumulate);
#endif
}
// The same with A in registers.
template <int N, class T, bool AlongN = false>
VLMOPS_DEVICE void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
#ifdef VLMOPS_SIMT
  vlmops_simt_wgmma(d[0], a, 0, b, N, accumulate, AlongN, detail::is_bf16(T{}));
#else
  detail::Wgmma<N, T>::template run<AlongN>(d, a, b, accumulate);
#endif
}

}  // namespace vlmops
