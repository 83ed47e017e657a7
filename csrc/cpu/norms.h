// RMSNorm and LayerNorm over rows, with the residual add before them, and their backward.
#pragma once

#include "isa.h"

namespace vlmops {

// Rows are dense, `cols` elements each. `dtype` is that of every row pointer; weight and bias are it too, or float32.
struct NormForward {
  const void* x;
  const void* residual;  // null: none
  void* total;           // x + residual, rounded; null without residual
  void* out;
  const void* weight;  // [cols]; null: ones
  const void* bias;    // [cols]; null: zeros
  long long cols;
  float eps;
  float offset;  // added to the weight; 0 also means: round before the weight (RMSNorm only)
  int dtype;
  bool float_params;  // weight and bias are float32
  bool center;        // LayerNorm
};

struct NormBackward {
  const void* grad;        // of out
  const void* grad_total;  // of x + residual; null: none
  const void* h;           // what was normalised
  const void* weight;
  void* dx;        // null: not wanted
  float* dweight;  // [cols] partial sums of this thread, added to; null: not wanted
  float* dbias;
  long long cols;
  float eps;
  float offset;
  int dtype;
  bool float_params;
  bool center;
};

}  // namespace vlmops

VLMOPS_DECLARE(void, norm_forward, const NormForward& a, long long first, long long last)
VLMOPS_DECLARE(void, norm_backward, const NormBackward& a, long long first, long long last)
