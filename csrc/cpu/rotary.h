// Rotary position embedding of [T, H, D], of q and k in one pass over the tokens.
#pragma once

#include "isa.h"

namespace vlmops {

struct RotaryHeads {
  const void* x;
  long long stride_t, stride_h;  // elements; a head's elements are dense
  void* out;                     // [T, heads, dim] dense
  long long heads;
};

struct Rotary {
  RotaryHeads parts[2];
  int num_parts;
  const float* cos;  // [T, turned]
  const float* sin;
  long long dim;
  long long turned;  // elements of a head that turn, even; the rest is copied
  int dtype;
  int interleaved;
  int inverse;  // the transpose: what a gradient needs
};

}  // namespace vlmops

VLMOPS_DECLARE(void, rotary_tokens, const Rotary& a, long long first, long long last)
