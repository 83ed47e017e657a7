// Stackful fibers: one per CUDA thread of the block that runs.
#pragma once

#include <cstddef>
#include <cstdint>
#ifdef VLMOPS_SIMT_UCONTEXT
#include <ucontext.h>
#endif

#if !defined(VLMOPS_SIMT_UCONTEXT) && !defined(__x86_64__)
#define VLMOPS_SIMT_UCONTEXT 1  // slower: a system call per switch
#include <ucontext.h>
#endif

namespace vlmops::simt {

inline constexpr size_t kStackBytes = 256 * 1024;

struct Context {
#ifdef VLMOPS_SIMT_UCONTEXT
  ucontext_t saved;
#else
  void* stack_pointer = nullptr;
#endif
  const char* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// `stacks` stacks with a guard page below each; they are kept for the process's life.
char* stack_of(size_t fiber);

// Makes `context` start in `entry` when it is switched to. `entry` never returns.
void prepare(Context& context, size_t fiber, void (*entry)());

// Saves the running context in `from` and continues `to`. `last`: `from` is never continued.
void switch_context(Context& from, Context& to, bool last);

// First thing in a new fiber.
void entered(Context& main);

}  // namespace vlmops::simt
