// Memory as a kernel sees it: where an address lies, who touched it last, what it cost.
#pragma once

#include <cstddef>
#include <cstdint>

#include "machine.h"

namespace vlmops::simt {

// capi.cpp's documentation has the meanings. All uint64, in the order of kCounterNames.
struct Counters {
  uint64_t accesses, switches;
  uint64_t global_load_requests, global_load_sectors, global_load_sectors_least, global_load_bytes,
      global_load_unique_bytes;
  uint64_t global_store_requests, global_store_sectors, global_store_sectors_least, global_store_bytes,
      global_store_unique_bytes;
  uint64_t shared_requests, shared_wavefronts, shared_wavefronts_least, shared_bytes;
  uint64_t atomics, mma_flops, barriers, warp_syncs, shuffles, ballots, ldmatrices, async_copies, tma_copies;
};
inline constexpr const char* kCounterNames =
    "accesses,switches,"
    "global_load_requests,global_load_sectors,global_load_sectors_least,global_load_bytes,global_load_unique_bytes,"
    "global_store_requests,global_store_sectors,global_store_sectors_least,global_store_bytes,"
    "global_store_unique_bytes,"
    "shared_requests,shared_wavefronts,shared_wavefronts_least,shared_bytes,"
    "atomics,mma_flops,barriers,warp_syncs,shuffles,ballots,ldmatrices,async_copies,tma_copies";

extern Counters counters;

// Global memory of the launches to come.
void register_buffer(const void* memory, size_t bytes, const char* name, bool initialised);
void clear_buffers();

bool begin_launch(size_t dynamic_bytes);
void begin_block();
void thread_ends(Fiber& fiber);
void end_launch();

enum class Kind : uint8_t { kRead, kWrite, kAtomic };

// Every access of the running thread passes here before it happens. `return_address`: of the call in the kernel.
void access(const void* memory, size_t bytes, Kind kind, const void* return_address, bool vector = true);

// cp.async of the running thread.
void async_copy(char* shared, const char* global, uint32_t bytes, bool valid, const void* return_address);
void async_commit();
void async_wait(size_t groups);

// One row of ldmatrix, read by `fiber`. False: not a row in shared memory (reported).
bool read_row(Fiber& fiber, const void* row);

struct Region;
// The region of a whole access by the running thread, or null after a report.
Region* locate(uintptr_t p, size_t bytes, const char* verb, uint32_t pc);

// Adds the requests of the pass that ended to the counters.
void flush_requests();

uint32_t pc_of(const void* return_address);

}  // namespace vlmops::simt
