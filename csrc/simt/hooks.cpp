// The functions g++'s -fsanitize=thread calls before every access, and the accesses of the device headers.
#include <cstring>

#include "device.h"
#include "memory.h"
#include "reports.h"

using namespace vlmops::simt;

#define CALLER __builtin_return_address(0)
#define HOOK   VLMOPS_SIMT_API

// A thread's own stack is its registers and local memory: most accesses end here.
static inline bool is_private(const void* p) {
  return current == nullptr ||
         reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(current->context.stack) < kStackBytes;
}

#define ACCESS(name, bytes, kind)                       \
  HOOK void __tsan_##name##bytes(void* p) {             \
    if (!is_private(p)) access(p, bytes, kind, CALLER); \
  }
#define ACCESSES(bytes)                        \
  ACCESS(read, bytes, Kind::kRead)             \
  ACCESS(write, bytes, Kind::kWrite)           \
  ACCESS(unaligned_read, bytes, Kind::kRead)   \
  ACCESS(unaligned_write, bytes, Kind::kWrite) \
  ACCESS(volatile_read, bytes, Kind::kRead)    \
  ACCESS(volatile_write, bytes, Kind::kWrite)
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

// Copies of whole structs: no one access, so no alignment of the whole.
HOOK void __tsan_read_range(void* p, unsigned long bytes) {
  if (!is_private(p)) access(p, bytes, Kind::kRead, CALLER, false);
}
HOOK void __tsan_write_range(void* p, unsigned long bytes) {
  if (!is_private(p)) access(p, bytes, Kind::kWrite, CALLER, false);
}

HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}

void vlmops_simt_load(void* registers, const void* memory, unsigned bytes) {
  if (!is_private(memory)) access(memory, bytes, Kind::kRead, CALLER);
  std::memcpy(registers, memory, bytes);
}

void vlmops_simt_store(void* memory, const void* registers, unsigned bytes) {
  if (!is_private(memory)) access(memory, bytes, Kind::kWrite, CALLER);
  std::memcpy(memory, registers, bytes);
}

float vlmops_simt_atomic_add_float(float* memory, float value) {
  access(memory, 4, Kind::kAtomic, CALLER);
  const float before = *memory;
  *memory = before + value;
  return before;
}

int vlmops_simt_atomic_add_int(int* memory, int value) {
  access(memory, 4, Kind::kAtomic, CALLER);
  const int before = *memory;
  *memory = static_cast<int>(static_cast<unsigned>(before) + static_cast<unsigned>(value));
  return before;
}

void vlmops_simt_fence() { current->fence_epoch = machine.epoch; }

void vlmops_simt_cp_async(void* shared, const void* global, unsigned bytes, bool valid) {
  async_copy(static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid, CALLER);
}
void vlmops_simt_cp_async_commit() { async_commit(); }
void vlmops_simt_cp_async_wait(int groups) { async_wait(static_cast<size_t>(groups)); }
