// One call of each CPU kernel, so that its instructions can be counted: scripts/cpu_budget.py compiles a file of this
// folder with the kernel of one instruction set and runs it under callgrind. No torch, one thread, fixed numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../cpu/isa.h"

#ifndef VLMOPS_ISA
#define VLMOPS_ISA generic
#endif

namespace vlmops {
namespace VLMOPS_ISA {}
namespace kernels = VLMOPS_ISA;  // the set that is counted
}  // namespace vlmops

// What callgrind counts: everything called from here. It knows the function by name.
extern "C" void vlmops_measured(void (*call)(const void*), const void* what) {
  call(what);
  asm volatile("" ::: "memory");  // no tail call: callgrind has to see the return
}
static void (*volatile const entry)(void (*)(const void*), const void*) = vlmops_measured;  // never inlined nor cloned

namespace vlmops {
namespace budget {

constexpr int kFloats[] = {kFloat32, kBFloat16, kFloat16};

inline const char* name(int dtype) {
  return dtype == kFloat32 ? "fp32" : dtype == kBFloat16 ? "bf16" : dtype == kFloat16 ? "fp16" : "uint8";
}

inline long long bytes(int dtype) { return dtype == kFloat32 ? 4 : dtype == kUInt8 ? 1 : 2; }

// Memory that is never freed: the addresses of a run are always the same.
inline char* room(long long size) {
  constexpr size_t kPage = 4096;
  const size_t pages = (static_cast<size_t>(size) / kPage + 1) * kPage;
  void* p = std::aligned_alloc(kPage, pages);
  if (p == nullptr) std::abort();
  std::memset(p, 0xff, pages);  // NaN in every float type: what is left unwritten shows
  return static_cast<char*>(p);
}

// n numbers of either sign between 1/8 and 1 that all float types hold exactly (any bytes for uint8).
inline void* numbers(int dtype, long long n) {
  char* p = room(n * bytes(dtype));
  uint32_t state = 12345;
  for (long long i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    const uint32_t sign = state >> 31, mantissa = state >> 16 & 127, down = 1 + (state >> 24 & 127) % 3;
    const uint32_t wide = sign << 31 | (127 - down) << 23 | mantissa << 16;
    const uint16_t brain = static_cast<uint16_t>(wide >> 16);
    const uint16_t half = static_cast<uint16_t>(sign << 15 | (15 - down) << 10 | mantissa << 3);
    if (dtype == kFloat32) std::memcpy(p + 4 * i, &wide, 4);
    else if (dtype == kBFloat16) std::memcpy(p + 2 * i, &brain, 2);
    else if (dtype == kFloat16) std::memcpy(p + 2 * i, &half, 2);
    else p[i] = static_cast<char>(state >> 20);
  }
  return p;
}

inline const float* floats(long long n) { return static_cast<const float*>(numbers(kFloat32, n)); }

inline float* zeros(long long n) {
  char* p = room(n * 4);
  std::memset(p, 0, static_cast<size_t>(n) * 4);
  return reinterpret_cast<float*>(p);
}

// Whether all n elements are finite and one of them is not 0: a call that did nothing has no cost to keep.
inline bool sound(const void* out, int dtype, long long n) {
  bool some = false;
  for (long long i = 0; i < n; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, static_cast<const char*>(out) + i * bytes(dtype), static_cast<size_t>(bytes(dtype)));
    const uint32_t infinity = dtype == kFloat32 ? 0x7f800000u : dtype == kBFloat16 ? 0x7f80u : 0x7c00u;
    if ((bits & infinity) == infinity) return false;
    some = some || (bits & (infinity | infinity >> 1)) != 0;
  }
  return some;
}

// Runs one case and says its name; `out` holds what it has to write.
template <class Call>
void count(const char* kernel, const std::string& label, const void* out, int dtype, long long n, const Call& call) {
  entry([](const void* what) { (*static_cast<const Call*>(what))(); }, &call);
  if (!sound(out, dtype, n)) {
    std::fprintf(stderr, "%s, %s: the output is not finite, or all of it is 0\n", kernel, label.c_str());
    std::exit(1);
  }
  std::printf("%s | %s\n", label.c_str(), kernel);
}

}  // namespace budget
}  // namespace vlmops
