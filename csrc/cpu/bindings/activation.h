// In-place activations over contiguous tensors.
#pragma once

#include "../activation.h"
#include "../dispatch.h"
#include "common.h"

namespace vlmops {
namespace activation_binding {

inline void quick_gelu_(at::Tensor& x) {
  TORCH_CHECK_VALUE(x.is_contiguous(), "x: expected contiguous");
  const int dtype = float_dtype(x, "x");
  char* data = static_cast<char*>(x.data_ptr());
  const int64_t size = x.element_size();
  static const auto kernel = VLMOPS_PICK(quick_gelu_inplace);
  at::parallel_for(0, x.numel(), 32768, [&](int64_t first, int64_t last) { kernel(data + first * size, last - first, dtype); });
}

}  // namespace activation_binding
}  // namespace vlmops

TORCH_LIBRARY_IMPL(vlmops_cpu, CPU, m) { m.impl("quick_gelu_", &vlmops::activation_binding::quick_gelu_); }
