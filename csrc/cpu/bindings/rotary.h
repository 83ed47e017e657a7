// rotary: checks and the split over tokens.
#pragma once

#include "../dispatch.h"
#include "../rotary.h"
#include "common.h"

namespace vlmops {
namespace rotary_binding {

inline at::Tensor rotary(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool interleaved) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.size(2) % 2 == 0 && (x.numel() == 0 || x.stride(2) == 1),
                    "x: expected [T, H, D] with dense heads and an even D, got ", x.sizes());
  for (const auto* table : {&cos, &sin})
    TORCH_CHECK_VALUE(table->dim() == 2 && table->size(0) == x.size(0) && table->size(1) == x.size(2) &&
                          table->scalar_type() == at::kFloat && table->is_contiguous(),
                      "cos, sin: expected contiguous float32 [T, D], got ", table->sizes());
  at::Tensor out = at::empty(x.sizes(), x.options());
  Rotary a{};
  a.x = x.const_data_ptr();
  a.stride_t = x.stride(0);
  a.stride_h = x.stride(1);
  a.cos = cos.const_data_ptr<float>();
  a.sin = sin.const_data_ptr<float>();
  a.out = out.data_ptr();
  a.heads = x.size(1);
  a.dim = x.size(2);
  a.dtype = float_dtype(x, "x");
  a.interleaved = interleaved;
  static const auto kernel = VLMOPS_PICK(rotary_tokens);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, a.heads * a.dim));
  if (out.numel() > 0)
    at::parallel_for(0, x.size(0), grain, [&](int64_t first, int64_t last) { kernel(a, first, last); });
  return out;
}

}  // namespace rotary_binding
}  // namespace vlmops

TORCH_LIBRARY_IMPL(vlmops_cpu, CPU, m) { m.impl("rotary", &vlmops::rotary_binding::rotary); }
