// Is this access ordered after those before it, and did anybody write what it reads?
//
// Two accesses of a block are ordered if one thread made both, or a barrier of the block lies between them, or a
// __syncwarp if one warp made both. Blocks of a launch are ordered by atomics after a fence only; launches always.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "memory.h"
#include "shadow.h"

namespace vlmops::simt {

// Checks an access of the running thread to a region and remembers it. `in_flight`: a cp.async that starts writing.
void check(Region& region, uintptr_t p, size_t bytes, Kind kind, uint32_t pc, bool in_flight = false);

// The same of a tile a matrix instruction reads, by 16 bytes. Not `finished`: it begins to.
void check_tile(Region& region, uintptr_t p, size_t bytes, uint32_t pc, bool finished);

void record_write(Cell& cell, uint32_t pc, bool atomic, bool in_flight);

// An atomic on global memory: acquires what earlier ones on this address released, and releases after a fence.
void synchronise(uintptr_t p);
void forget_releases();

// For reports: the running thread; "shared tile+16".
std::string running();
std::string position(const Region& region, uintptr_t p);

}  // namespace vlmops::simt
