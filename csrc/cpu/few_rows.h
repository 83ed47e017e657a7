// A product of few rows, as decoding makes one a token: the weight is read once, as it lies, at the speed of the
// memory.
#pragma once

#include "isa.h"

namespace vlmops {

enum FewRowsActivation : int { kFewRowsNone = 0, kFewRowsGelu = 1, kFewRowsGeluTanh = 2, kFewRowsSilu = 3 };

// out = act(x W^T + b). Everything is dense.
struct FewRows {
  const float* x;      // [rows, depth]
  const void* weight;  // [cols, depth] of dtype
  const void* bias;    // [cols] of dtype; null: none
  void* out;           // [rows, cols] of out_dtype: dtype, or float32
  long long rows;
  long long cols;
  long long depth;
  int dtype;
  int out_dtype;
  int activation;
};

}  // namespace vlmops

// The columns first <= c < last of every row.
VLMOPS_DECLARE(void, few_rows_columns, const FewRows& a, long long first, long long last)
