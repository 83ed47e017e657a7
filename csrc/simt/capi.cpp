// The C interface of the host SIMT machine. One launch at a time, whatever thread calls.
//
//   The library must be loaded before any kernel unit, with RTLD_GLOBAL (ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)):
//   it defines the __tsan_* functions and the vlmops_simt_* functions that kernel units call.
//
//   void vlmops_simt_register(const void* memory, uint64_t bytes, const char* name, int initialised)
//       Global memory that launches may touch, from now until it is cleared. What has been written is remembered from
//       launch to launch. The same range again starts anew; overlapping ranges (views of one tensor) become one.
//   void vlmops_simt_clear_buffers()
//   int vlmops_simt_launch(void (*kernel)(void** args), void** args, const uint32_t grid[3], const uint32_t block[3],
//                          uint64_t dynamic_shared_bytes, int schedule, uint64_t seed)
//       Runs a kernel to its end. `kernel` is the symbol <VLMOPS_NAME>_simt of a kernel unit; args[i] points at the
//       i-th argument. schedule: 0 blocks, warps and lanes in order, 1 all reversed, 2 shuffled by `seed`. Returns how
//       many distinct bugs were found; the launch is given up at the first that stops a GPU too (a bad address,
//       divergence).
//   const char* vlmops_simt_reports()      one line per bug, of all launches since they were cleared: "kind: what,
//   where" void vlmops_simt_clear_reports() const char* vlmops_simt_counter_names()  comma separated void
//   vlmops_simt_counters(uint64_t* values)  in that order, summed over the launches since they were cleared void
//   vlmops_simt_clear_counters()
//
//   Counters. Requests are instructions of a warp; sectors are 32 bytes; *_least is the fewest sectors (wavefronts)
//   into which the request's distinct bytes fit; bytes count every active lane; unique_bytes count a byte once a
//   launch. cp.async is a global load and a shared request, ldmatrix a shared request, an atomic a store.
#include <cstring>
#include <mutex>

#include "machine.h"
#include "memory.h"
#include "module.h"
#include "reports.h"

using namespace vlmops::simt;

namespace {

std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;

uint64_t volume(const uint32_t size[3]) { return uint64_t{size[0]} * size[1] * size[2]; }

}  // namespace

VLMOPS_SIMT_API void vlmops_simt_register(const void* memory, uint64_t bytes, const char* name, int initialised) {
  const Lock lock(mutex);
  register_buffer(memory, bytes, name, initialised != 0);
}

VLMOPS_SIMT_API void vlmops_simt_clear_buffers() {
  const Lock lock(mutex);
  clear_buffers();
}

VLMOPS_SIMT_API int vlmops_simt_launch(void (*kernel)(void**), void** args, const uint32_t grid[3],
                                       const uint32_t block[3], uint64_t dynamic_shared_bytes, int schedule,
                                       uint64_t seed) {
  const Lock lock(mutex);
  const uint64_t threads = volume(block);
  if (!load_module(reinterpret_cast<const void*>(kernel))) {
    report("launch", "the function is not in a kernel unit (one compiled with csrc/simt/entry.cpp)");
  } else if (threads == 0 || threads > kMostThreads || block[2] > 64) {
    report("launch", text("a block of %u x %u x %u threads: 1 to 1024 are allowed", block[0], block[1], block[2]));
  } else if (volume(grid) == 0 || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) {
    report("launch", text("a grid of %u x %u x %u blocks: at least 1, at most 2^31 - 1 x 65535 x 65535", grid[0],
                          grid[1], grid[2]));
  } else {
    run(kernel, args, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_shared_bytes,
        static_cast<Schedule>(schedule), seed);
  }
  return finish_reports();
}

VLMOPS_SIMT_API const char* vlmops_simt_reports() { return reports_text().c_str(); }

VLMOPS_SIMT_API void vlmops_simt_clear_reports() {
  const Lock lock(mutex);
  clear_reports();
}

VLMOPS_SIMT_API const char* vlmops_simt_counter_names() { return kCounterNames; }

VLMOPS_SIMT_API void vlmops_simt_counters(uint64_t* values) {
  const Lock lock(mutex);
  std::memcpy(values, &counters, sizeof counters);
}

VLMOPS_SIMT_API void vlmops_simt_clear_counters() {
  const Lock lock(mutex);
  counters = Counters{};
}
