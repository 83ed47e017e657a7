// Pixels to patch vectors: the pass in front of the product.
#pragma once

#include "isa.h"

namespace vlmops {

// images [n, frames_in, channels, height, width], strides in elements, pixels of a row dense.
struct PatchRows {
  const void* images;
  long long stride_n, stride_t, stride_c, stride_h;
  long long frames_in;
  int channels, grid_h, grid_w;  // patches
  int grid_t;
  int patch, frames;             // pixels on a side, frames in a patch
  int merge;                     // 2x2 token order
  int channels_last;
  int in_dtype, out_dtype;       // DType
  const float* scale;            // [channels]: x * scale + shift
  const float* shift;
  void* out;                     // [tokens, channels * frames * patch * patch]
};

}  // namespace vlmops

// Tokens first..last of the result.
VLMOPS_DECLARE(void, patch_rows, const PatchRows& a, long long first, long long last)
