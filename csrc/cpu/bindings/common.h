// What every binding needs.
#pragma once

#include "../isa.h"

namespace vlmops {

// DType of a float32, bfloat16 or float16 tensor; a TypeError naming the argument for anything else.
inline int float_dtype(const at::Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return kFloat32;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kFloat16;
    default: TORCH_CHECK_TYPE(false, name, ": expected float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

}  // namespace vlmops
