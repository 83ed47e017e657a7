// What follows a matrix product and no library fuses into it: one pass over the product while it is in the cache.
#pragma once

#include "isa.h"

namespace vlmops {

enum EpilogueActivation : int { kNoActivation = 0, kQuickGelu = 1 };

// out = residual + mask * scale * act(product), rounded once. Rows are dense.
struct Epilogue {
  const void* product;        // [rows, cols] of product_dtype
  void* out;                  // [rows, cols] of dtype; may be the product itself
  const void* residual;       // like out; null: none
  const float* scale;         // [cols]; null: `factor` for all
  const unsigned char* mask;  // [rows]; null: every row counts
  float factor;
  long long cols;
  int product_dtype;  // dtype, or float32
  int dtype;
  int activation;
};

}  // namespace vlmops

VLMOPS_DECLARE(void, epilogue_rows, const Epilogue& a, long long first, long long last)
