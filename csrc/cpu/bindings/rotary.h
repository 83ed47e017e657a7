// rotary: checks and the split over tokens.
#pragma once

#include "../dispatch.h"
#include "../rotary.h"
#include "common.h"

namespace vlmops {
namespace rotary_binding {

// x, and k if there is one (else an empty tensor comes back), turned by tables [T, R], R <= D.
inline std::tuple<at::Tensor, at::Tensor> rotary(const at::Tensor& x, const std::optional<at::Tensor>& k,
                                                 const at::Tensor& cos, const at::Tensor& sin, bool interleaved,
                                                 bool inverse) {
  TORCH_CHECK_VALUE(x.dim() == 3, "x: expected [T, H, D], got ", x.sizes());
  const int64_t tokens = x.size(0), dim = x.size(2);
  Rotary a{};
  a.dim = dim;
  a.turned = cos.dim() == 2 ? cos.size(1) : 0;
  a.dtype = float_dtype(x, "x");
  a.interleaved = interleaved;
  a.inverse = inverse;
  for (const auto* table : {&cos, &sin})
    TORCH_CHECK_VALUE(table->dim() == 2 && table->size(0) == tokens && table->size(1) == a.turned && a.turned <= dim &&
                          a.turned % 2 == 0 && table->scalar_type() == at::kFloat && table->is_contiguous(),
                      "cos, sin: expected contiguous float32 [", tokens, ", up to ", dim, "], got ", table->sizes());
  a.cos = cos.const_data_ptr<float>();
  a.sin = sin.const_data_ptr<float>();
  at::Tensor dense[2], out[2] = {at::Tensor(), at::empty({0}, x.options())};
  const at::Tensor* given[2] = {&x, k.has_value() ? &*k : nullptr};
  int64_t heads = 0;
  for (int i = 0; i < 2 && given[i] != nullptr; ++i) {
    const at::Tensor& part = *given[i];
    TORCH_CHECK_VALUE(
        part.dim() == 3 && part.size(0) == tokens && part.size(2) == dim && part.scalar_type() == x.scalar_type(),
        "k: expected ", x.scalar_type(), " [", tokens, ", H, ", dim, "] like x, got ", part.scalar_type(), " ",
        part.sizes());
    dense[i] = part.stride(2) == 1 ? part : part.contiguous();
    out[i] = at::empty(part.sizes(), part.options());
    a.parts[i] = {dense[i].const_data_ptr(), dense[i].stride(0), dense[i].stride(1), out[i].data_ptr(), part.size(1)};
    a.num_parts = i + 1;
    heads += part.size(1);
  }
  static const auto kernel = VLMOPS_PICK(rotary_tokens);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, heads * dim));
  if (tokens * heads * dim > 0)
    at::parallel_for(0, tokens, grain, [&](int64_t first, int64_t last) { kernel(a, first, last); });
  return {out[0], out[1]};
}

}  // namespace rotary_binding
}  // namespace vlmops

TORCH_LIBRARY_IMPL(vlmops_cpu, CPU, m) { m.impl("rotary", &vlmops::rotary_binding::rotary); }
