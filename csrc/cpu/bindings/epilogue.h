// vlmops_cpu::epilogue: checks and the split by rows.
#pragma once

#include "../dispatch.h"
#include "../epilogue.h"
#include "common.h"

namespace vlmops {
namespace epilogue_binding {

inline void epilogue(const at::Tensor& product, at::Tensor& out, bool quick_gelu,
                     const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& row_mask,
                     const std::optional<at::Tensor>& residual) {
  TORCH_CHECK_VALUE(product.dim() == 2 && product.is_contiguous(), "product: expected contiguous [rows, N], got shape ",
                    product.sizes());
  TORCH_CHECK_VALUE(out.sizes() == product.sizes() && out.is_contiguous(), "out: expected contiguous ", product.sizes(),
                    ", got shape ", out.sizes());
  const int64_t rows = product.size(0), cols = product.size(1);
  Epilogue a{};
  a.product = product.const_data_ptr();
  a.out = out.data_ptr();
  a.factor = 1.f;
  a.cols = cols;
  a.product_dtype = float_dtype(product, "product");
  a.dtype = float_dtype(out, "out");
  a.activation = quick_gelu ? kQuickGelu : kNoActivation;
  TORCH_CHECK_TYPE(a.product_dtype == a.dtype || a.product_dtype == kFloat32, "product: expected float32 or ",
                   out.scalar_type(), ", got ", product.scalar_type());
  at::Tensor wide;
  if (scale.has_value()) {
    TORCH_CHECK_VALUE(scale->numel() == 1 || (scale->dim() == 1 && scale->size(0) == cols),
                      "scale: expected a scalar or [", cols, "], got shape ", scale->sizes());
    wide = scale->to(at::kFloat).contiguous();
    if (wide.numel() == 1) {
      a.factor = *wide.const_data_ptr<float>();
    } else {
      a.scale = wide.const_data_ptr<float>();
    }
  }
  at::Tensor mask, more;
  if (row_mask.has_value()) {
    TORCH_CHECK_VALUE(row_mask->scalar_type() == at::kBool && row_mask->numel() == rows, "row_mask: expected bool [",
                      rows, "]");
    mask = row_mask->contiguous();
    a.mask = reinterpret_cast<const unsigned char*>(mask.const_data_ptr<bool>());
  }
  if (residual.has_value()) {
    TORCH_CHECK_VALUE(residual->sizes() == out.sizes() && residual->scalar_type() == out.scalar_type(),
                      "residual: expected ", out.scalar_type(), " ", out.sizes(), ", got ", residual->scalar_type(),
                      " ", residual->sizes());
    more = residual->contiguous();
    a.residual = more.const_data_ptr();
  }
  if (out.numel() == 0) return;
  static const auto kernel = VLMOPS_PICK(epilogue_rows);
  at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / cols),
                   [&](int64_t first, int64_t last) { kernel(a, first, last); });
}

}  // namespace epilogue_binding
}  // namespace vlmops

TORCH_LIBRARY_IMPL(vlmops_cpu, CPU, m) { m.impl("epilogue", &vlmops::epilogue_binding::epilogue); }
