#include "shadow.h"

#include <utility>

namespace vlmops::simt {

Region::Region(uintptr_t b, uintptr_t e, std::string n, bool is_shared)
    : begin(b), end(e), name(std::move(n)), shared(is_shared) {
  cells.resize(((end + 15) >> 4) - (begin >> 4));
}

void Region::refine(uintptr_t p, uint64_t bytes) {
  const uint64_t bits = (p | bytes) & ((uint64_t{1} << shift) - 1);
  if (bits == 0) return;
  const auto smaller = static_cast<unsigned>(__builtin_ctzll(bits));
  const unsigned times = 1u << (shift - smaller);
  std::vector<Cell> split;
  split.reserve(cells.size() * times);
  for (const Cell& cell : cells) split.insert(split.end(), times, cell);
  cells = std::move(split);
  shift = smaller;
}

void Region::initialise(uintptr_t from, uintptr_t to, bool value) {
  if (from == to) return;
  // the ends of a whole region may lie inside a cell that nothing else uses
  if (from != begin) refine(from, 0);
  if (to != end) refine(to, 0);
  const uint64_t last = (to - 1 - origin()) >> shift;
  for (uint64_t i = (from - origin()) >> shift; i <= last; ++i) cells[i].initialised = value;
}

}  // namespace vlmops::simt
