// patch_rows: checks, strides, the split over tokens.
#pragma once

#include "../dispatch.h"
#include "../patchify.h"
#include "common.h"

namespace vlmops {
namespace patchify_binding {

inline at::Tensor patch_rows(const at::Tensor& given, at::ArrayRef<double> mean, at::ArrayRef<double> std, int64_t patch,
                             int64_t frames, bool merge, bool channels_last, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(given.dim() == 5 && patch > 0 && frames > 0 && patch < 65536 && frames < 65536,
                    "images: expected [n, T, C, H, W], got ", given.sizes());
  const at::Tensor images = given.stride(4) == 1 ? given : given.contiguous();
  const int64_t n = images.size(0), t = images.size(1), c = images.size(2), h = images.size(3), w = images.size(4);
  TORCH_CHECK_VALUE(t > 0 && h % patch == 0 && w % patch == 0, "images: expected multiples of the patch ", patch, ", got ", h, "x", w);
  const int64_t grid_t = (t + frames - 1) / frames, grid_h = h / patch, grid_w = w / patch;
  TORCH_CHECK_VALUE(!merge || (grid_h % 2 == 0 && grid_w % 2 == 0), "images: expected an even grid for 2x2 order, got ", grid_h, "x", grid_w);
  TORCH_CHECK_VALUE((mean.empty() || static_cast<int64_t>(mean.size()) == c) && (std.empty() || static_cast<int64_t>(std.size()) == c),
                    "mean, std: expected one value a channel");
  const bool raw = images.scalar_type() == at::kByte;
  std::vector<float> scale(c), shift(c);
  for (int64_t i = 0; i < c; ++i) {  // ((x / 255) - mean) / std as one multiply-add
    const double s = std.empty() ? 1.0 : std[i], m = mean.empty() ? 0.0 : mean[i];
    scale[i] = static_cast<float>((raw ? 1.0 / 255.0 : 1.0) / s);
    shift[i] = static_cast<float>(-m / s);
  }
  at::Tensor out = at::empty({n * grid_t * grid_h * grid_w, c * frames * patch * patch}, images.options().dtype(dtype));
  PatchRows a{};
  a.images = images.const_data_ptr();
  a.stride_n = images.stride(0);
  a.stride_t = images.stride(1);
  a.stride_c = images.stride(2);
  a.stride_h = images.stride(3);
  a.frames_in = t;
  a.channels = static_cast<int>(c);
  a.grid_t = static_cast<int>(grid_t);
  a.grid_h = static_cast<int>(grid_h);
  a.grid_w = static_cast<int>(grid_w);
  a.patch = static_cast<int>(patch);
  a.frames = static_cast<int>(frames);
  a.merge = merge;
  a.channels_last = channels_last;
  a.in_dtype = raw ? kUInt8 : float_dtype(images, "images");
  a.out_dtype = float_dtype(out, "dtype");
  a.scale = scale.data();
  a.shift = shift.data();
  a.out = out.data_ptr();
  static const auto kernel = VLMOPS_PICK(patch_rows);
  at::parallel_for(0, out.size(0), 16, [&](int64_t first, int64_t last) { kernel(a, first, last); });
  return out;
}

}  // namespace patchify_binding
}  // namespace vlmops

TORCH_LIBRARY_IMPL(vlmops_cpu, CPU, m) { m.impl("patch_rows", &vlmops::patchify_binding::patch_rows); }
