// wgmma: products a warp has issued and not waited for. Used by hopper.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vlmops::simt {

// Where the 128-byte swizzle puts a shared-memory address: bits 4-6 are exclusive-ored with bits 7-9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void begin_products();
void end_products();

// The running thread starts to overwrite shared memory: after every product that read it?
void check_products(uintptr_t p, size_t bytes, uint32_t pc);

}  // namespace vlmops::simt
