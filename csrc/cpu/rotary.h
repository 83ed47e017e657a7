// Rotary position embedding of [T, H, D].
#pragma once

#include "isa.h"

namespace vlmops {

struct Rotary {
  const void* x;
  long long stride_t, stride_h;  // elements; a head's elements are dense
  const float* cos;              // [T, dim]
  const float* sin;
  void* out;                     // [T, heads, dim] dense
  long long heads;
  long long dim;                 // even
  int dtype;
  int interleaved;
};

}  // namespace vlmops

VLMOPS_DECLARE(void, rotary_tokens, const Rotary& a, long long first, long long last)
