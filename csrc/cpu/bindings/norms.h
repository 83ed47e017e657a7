// RMSNorm and LayerNorm: checks, row split, the sums over rows.
#pragma once

#include "../dispatch.h"
#include "../norms.h"

namespace vlmops {
namespace norms_binding {

inline int norm_dtype(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return kFloat32;
    case at::kBFloat16: return kBFloat16;
    case at::kHalf: return kFloat16;
    default: TORCH_CHECK(false, "x: expected float32, bfloat16 or float16, got ", x.scalar_type());
  }
}

inline const void* rows_of(const std::optional<at::Tensor>& x, const at::Tensor& like, const char* name) {
  if (!x.has_value()) return nullptr;
  TORCH_CHECK(x->sizes() == like.sizes() && x->scalar_type() == like.scalar_type() && x->is_contiguous(), name,
              ": expected contiguous, like x");
  return x->const_data_ptr();
}

// Whether weight and bias are float32 beside low-precision rows; both are then.
inline bool check_params(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias) {
  bool mixed = false;
  for (const auto* p : {&weight, &bias}) {
    if (!p->has_value()) continue;
    const at::Tensor& t = p->value();
    TORCH_CHECK(t.dim() == 1 && t.size(0) == x.size(1) && t.is_contiguous(), "weight, bias: expected contiguous [",
                x.size(1), "]");
    TORCH_CHECK(t.scalar_type() == x.scalar_type() || t.scalar_type() == at::kFloat,
                "weight, bias: expected x's dtype or float32");
    mixed |= t.scalar_type() != x.scalar_type();
  }
  TORCH_CHECK(
      !mixed || ((!weight || weight->scalar_type() == at::kFloat) && (!bias || bias->scalar_type() == at::kFloat)),
      "weight, bias: expected the same dtype");
  return mixed;
}

inline int64_t grain(const at::Tensor& x) { return std::max<int64_t>(1, 16384 / x.size(1)); }

inline void check_rows(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) > 0 && x.size(1) < (int64_t{1} << 30) && x.is_contiguous(),
              "x: expected contiguous [T, C]");
}

inline std::tuple<at::Tensor, at::Tensor> norm(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                               const std::optional<at::Tensor>& weight,
                                               const std::optional<at::Tensor>& bias, double eps, double offset,
                                               bool center) {
  check_rows(x);
  const bool mixed = check_params(x, weight, bias);
  at::Tensor out = at::empty_like(x);
  at::Tensor total = residual.has_value() ? at::empty_like(x) : at::empty({0}, x.options());
  NormForward a{};
  a.x = x.const_data_ptr();
  a.residual = rows_of(residual, x, "residual");
  a.total = residual.has_value() ? total.data_ptr() : nullptr;
  a.out = out.data_ptr();
  a.weight = weight.has_value() ? weight->const_data_ptr() : nullptr;
  a.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  a.cols = x.size(1);
  a.eps = static_cast<float>(eps);
  a.offset = static_cast<float>(offset);
  a.dtype = norm_dtype(x);
  a.float_params = mixed;
  a.center = center;
  static const auto kernel = VLMOPS_PICK(norm_forward);
  at::parallel_for(0, x.size(0), grain(x), [&](int64_t first, int64_t last) { kernel(a, first, last); });
  return {out, total};
}

// dx like h; dweight and dbias float32 [C]; empty where not needed.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_grad(const at::Tensor& grad,
                                                                const std::optional<at::Tensor>& grad_total,
                                                                const at::Tensor& h,
                                                                const std::optional<at::Tensor>& weight, double eps,
                                                                double offset, bool center, bool need_x,
                                                                bool need_weight, bool need_bias) {
  check_rows(h);
  const bool mixed = check_params(h, weight, std::nullopt);
  const auto floats = h.options().dtype(at::kFloat);
  const int64_t cols = h.size(1), threads = at::get_num_threads();
  at::Tensor dx = need_x ? at::empty_like(h) : at::empty({0}, h.options());
  at::Tensor dw = at::zeros({need_weight ? threads : 0, cols}, floats),
             db = at::zeros({need_bias ? threads : 0, cols}, floats);
  NormBackward shared{};
  shared.grad = rows_of(grad, h, "grad");
  shared.grad_total = rows_of(grad_total, h, "grad_total");
  shared.h = h.const_data_ptr();
  shared.weight = weight.has_value() ? weight->const_data_ptr() : nullptr;
  shared.dx = need_x ? dx.data_ptr() : nullptr;
  shared.cols = cols;
  shared.eps = static_cast<float>(eps);
  shared.offset = static_cast<float>(offset);
  shared.dtype = norm_dtype(h);
  shared.float_params = mixed;
  shared.center = center;
  static const auto kernel = VLMOPS_PICK(norm_backward);
  float* dw_data = need_weight ? dw.data_ptr<float>() : nullptr;
  float* db_data = need_bias ? db.data_ptr<float>() : nullptr;
  at::parallel_for(0, h.size(0), grain(h), [&](int64_t first, int64_t last) {
    NormBackward a = shared;
    const int64_t thread = at::get_thread_num();
    a.dweight = dw_data == nullptr ? nullptr : dw_data + thread * cols;
    a.dbias = db_data == nullptr ? nullptr : db_data + thread * cols;
    kernel(a, first, last);
  });
  return {dx, need_weight ? dw.sum(0) : dw.flatten(), need_bias ? db.sum(0) : db.flatten()};
}

}  // namespace norms_binding
}  // namespace vlmops

TORCH_LIBRARY_IMPL(vlmops_cpu, CPU, m) {
  m.impl("norm", &vlmops::norms_binding::norm);
  m.impl("norm_backward", &vlmops::norms_binding::norm_grad);
}
