// Warp collectives and reductions. All 32 lanes take part: a partial warp is a bug the SIMT machine reports.
#pragma once

#include "math.cuh"
#include "platform.cuh"

namespace vlmops {

VLMOPS_DEVICE int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }  // of a one-dimensional block
VLMOPS_DEVICE int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// T: a 32-bit type.
template <class T>
VLMOPS_DEVICE T shfl_xor(T value, int mask) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  return __shfl_xor_sync(kFullMask, value, mask);
}
template <class T>
VLMOPS_DEVICE T shfl(T value, int lane) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  return __shfl_sync(kFullMask, value, lane);
}
template <class T>
VLMOPS_DEVICE T shfl_down(T value, int delta) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  return __shfl_down_sync(kFullMask, value, static_cast<unsigned>(delta));
}
template <class T>
VLMOPS_DEVICE T shfl_up(T value, int delta) {
  static_assert(sizeof(T) == 4, "shuffles move 32 bits");
  return __shfl_up_sync(kFullMask, value, static_cast<unsigned>(delta));
}
VLMOPS_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(kFullMask, predicate); }
VLMOPS_DEVICE bool warp_any(bool predicate) { return ballot(predicate) != 0; }
VLMOPS_DEVICE bool warp_all(bool predicate) { return ballot(predicate) == kFullMask; }

// Over groups of Lanes neighbouring lanes (a power of two); every lane gets its group's result.
template <int Lanes = kWarp, class T>
VLMOPS_DEVICE T warp_sum(T value) {
  VLMOPS_UNROLL
  for (int mask = Lanes / 2; mask > 0; mask /= 2) value += shfl_xor(value, mask);
  return value;
}
template <int Lanes = kWarp>
VLMOPS_DEVICE float warp_max(float value) {  // NaN is dropped, as by fmaxf
  VLMOPS_UNROLL
  for (int mask = Lanes / 2; mask > 0; mask /= 2) value = max_float(value, shfl_xor(value, mask));
  return value;
}
template <int Lanes = kWarp>
VLMOPS_DEVICE int warp_max(int value) {
  VLMOPS_UNROLL
  for (int mask = Lanes / 2; mask > 0; mask /= 2) value = max_of(value, shfl_xor(value, mask));
  return value;
}

}  // namespace vlmops
