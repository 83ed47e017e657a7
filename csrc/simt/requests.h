// Requests: what the lanes of a warp access with one instruction, and what that costs.
#pragma once

#include <cstdint>

namespace vlmops::simt {

struct Request {
  uint32_t mask = 0;
  uint32_t bytes = 0;  // per lane
  uintptr_t address[32];

  void add(int lane, uintptr_t p, uint32_t n) {
    mask |= 1u << lane;
    bytes = n;
    address[lane] = p;
  }
};

enum class Path : uint8_t { kGlobalLoad, kGlobalStore, kShared };

// Notes an access of the running lane. Lanes of a warp run one after another between two collectives; their accesses
// are aligned into requests by instruction and order.
void note(int lane, uint32_t pc, uintptr_t p, uint32_t bytes, Path path);

// `first`: also counts a request (ldmatrix x4 is one request of four phases).
void count_shared(const Request& request, bool first);

}  // namespace vlmops::simt
