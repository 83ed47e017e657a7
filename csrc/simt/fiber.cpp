#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace vlmops::simt {

namespace {

constexpr size_t kPage = 4096;

}  // namespace

char* stack_of(size_t fiber) {
  static std::vector<char*> stacks;
  while (stacks.size() <= fiber) {
    void* memory =
        mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
      std::perror("vlmops simt: no memory for a thread's stack");
      std::abort();
    }
    stacks.push_back(static_cast<char*>(memory) + kPage);
  }
  return stacks[fiber];
}

#ifndef VLMOPS_SIMT_UCONTEXT
// The callee-saved registers of the System V ABI on the old stack, then off the new one.
extern "C" void vlmops_simt_swap(void** from, void* to);
asm(R"(
.text
.globl vlmops_simt_swap
.hidden vlmops_simt_swap
.type vlmops_simt_swap, @function
vlmops_simt_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vlmops_simt_swap, . - vlmops_simt_swap
)");
#endif

void prepare(Context& context, size_t fiber, void (*entry)()) {
  char* stack = stack_of(fiber);
  context.stack = stack;
  context.stack_bytes = kStackBytes;
  context.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, kStackBytes);  // a fiber given up in an earlier launch left its poison
#endif
#ifdef VLMOPS_SIMT_UCONTEXT
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = kStackBytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
#else
  // Stacks whose tops are multiples of 4096 bytes apart would share a few cache sets: each starts elsewhere.
  char* top = stack + kStackBytes - 64 - (fiber % 32) * 448;
  void** sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;                         // keeps the stack aligned as after a call
  *--sp = reinterpret_cast<void*>(entry);  // where `ret` goes
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  context.stack_pointer = sp;
#endif
}

void switch_context(Context& from, Context& to, [[maybe_unused]] bool last) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef VLMOPS_SIMT_UCONTEXT
  swapcontext(&from.saved, &to.saved);
#else
  vlmops_simt_swap(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void entered([[maybe_unused]] Context& main) {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (main.stack == nullptr) {  // the first fiber is entered from the main context
    main.stack = static_cast<const char*>(bottom);
    main.stack_bytes = bytes;
  }
#endif
}

}  // namespace vlmops::simt
