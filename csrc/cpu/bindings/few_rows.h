// vlmops_cpu::few_rows: checks and the split by columns.
#pragma once

#include "../dispatch.h"
#include "../few_rows.h"
#include "common.h"

namespace vlmops {
namespace few_rows_binding {

inline void few_rows(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                     int64_t activation, at::Tensor& out) {
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.is_contiguous(), "weight: expected contiguous [N, K], got shape ",
                    weight.sizes());
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) == weight.size(1), "x: expected [rows, ", weight.size(1), "], got shape ",
                    x.sizes());
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == x.size(0) && out.size(1) == weight.size(0) && out.is_contiguous(),
                    "out: expected contiguous [", x.size(0), ", ", weight.size(0), "], got shape ", out.sizes());
  TORCH_CHECK_VALUE(activation >= kFewRowsNone && activation <= kFewRowsSilu, "activation: expected 0 to ",
                    int(kFewRowsSilu), ", got ", activation);
  float_dtype(x, "x");
  FewRows a{};
  a.dtype = float_dtype(weight, "weight");
  a.out_dtype = float_dtype(out, "out");
  TORCH_CHECK_TYPE(a.out_dtype == a.dtype || a.out_dtype == kFloat32, "out: expected float32 or ", weight.scalar_type(),
                   ", got ", out.scalar_type());
  at::Tensor offsets;
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias: expected [", weight.size(0),
                      "], got shape ", bias->sizes());
    TORCH_CHECK_TYPE(bias->scalar_type() == weight.scalar_type(), "bias: expected ", weight.scalar_type(), ", got ",
                     bias->scalar_type());
    offsets = bias->contiguous();
    a.bias = offsets.const_data_ptr();
  }
  const at::Tensor wide = x.to(at::kFloat).contiguous();
  a.x = wide.const_data_ptr<float>();
  a.weight = weight.const_data_ptr();
  a.out = out.data_ptr();
  a.rows = out.size(0);
  a.cols = out.size(1);
  a.depth = weight.size(1);
  a.activation = static_cast<int>(activation);
  if (out.numel() == 0) return;
  static const auto kernel = VLMOPS_PICK(few_rows_columns);
  const int64_t grain = std::max<int64_t>(16, 65536 / std::max<int64_t>(1, a.depth));  // less does not pay a thread
  at::parallel_for(0, a.cols, grain, [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

}  // namespace few_rows_binding
}  // namespace vlmops

TORCH_LIBRARY_IMPL(vlmops_cpu, CPU, m) { m.impl("few_rows", &vlmops::few_rows_binding::few_rows); }
