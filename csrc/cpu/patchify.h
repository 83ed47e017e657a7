// Pixels to patch vectors: the pass in front of the product.
#pragma once

#include "isa.h"

namespace vlmops {

// Equal images [n, frames_in, channels, height, width]; any strides, in elements.
struct PatchRows {
  const void* images;
  void* out;  // [tokens, channels * frames * patch * patch]
  long long stride_n, stride_t, stride_c, stride_h, stride_w;
  long long frames_in;
  int channels, frames, patch;  // frames in a patch, pixels on a side
  int grid_t, grid_h, grid_w;   // patches
  int merge;                    // 2x2 token order
  int channels_last;            // (frame, row, column, channel) in a patch vector
  int in_dtype, out_dtype;      // DType
  const float* scale;           // x * scale + shift: [channels], or [patch * channels] of a line if channels_last
  const float* shift;
};

// Rows that are patch vectors already: `runs` runs of `length` elements each.
struct NormaliseRows {
  const void* rows;
  void* out;  // [rows, runs * length]
  long long stride, runs, length;
  int repeated;  // every run has the same [length] scales; else run i has the one scale[i]
  int in_dtype, out_dtype;
  const float* scale;
  const float* shift;
};

}  // namespace vlmops

// Tokens first..last of `a`, written to rows first..last of out.
VLMOPS_DECLARE(void, patch_rows, const PatchRows& a, long long first, long long last)
VLMOPS_DECLARE(void, normalise_rows, const NormaliseRows& a, long long first, long long last)
