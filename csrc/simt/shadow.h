// Shadow memory: for every piece of a buffer, who wrote it last and who read it since.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vlmops::simt {

inline constexpr uint16_t kNobody = 0xffff;

struct Access {
  uint32_t epoch = 0;  // 0: never
  uint32_t warp_epoch = 0;
  uint32_t pc = 0;
  uint32_t time = 0;  // of the thread (hopper.h)
  uint16_t thread = kNobody;
  uint16_t other = kNobody;  // of a read: another lane of the warp, in the same interval. Of a write: 1 if atomic
};

struct Cell {
  Access write;
  Access read;                 // the last in the current barrier interval
  uint32_t earlier_block = 0;  // epoch of a read by an earlier block of the launch
  uint32_t second_pc = 0;      // a reader of another warp in the interval of `read`
  uint32_t second_time = 0;
  uint16_t second_thread = kNobody;
  bool initialised = false;  // global memory only: shared memory is what the block wrote
  bool in_flight = false;    // destination of a cp.async that has not been waited for
};

// A piece of memory a kernel may touch. Its cells start at 16 bytes each and are split when something smaller comes.
struct Region {
  uintptr_t begin = 0, end = 0;
  std::string name;
  bool shared = false;
  unsigned shift = 4;
  std::vector<Cell> cells;

  Region() = default;
  Region(uintptr_t b, uintptr_t e, std::string n, bool is_shared);

  uintptr_t origin() const { return begin & ~uintptr_t{15}; }
  // Cells become small enough for an access of `bytes` at `p` to cover whole ones.
  void refine(uintptr_t p, uint64_t bytes);
  Cell* cell(uintptr_t p) { return &cells[(p - origin()) >> shift]; }
  void initialise(uintptr_t from, uintptr_t to, bool value);
};

}  // namespace vlmops::simt
