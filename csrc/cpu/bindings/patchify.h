// patch_rows: checks, strides, the split over tokens.
#pragma once

#include "../dispatch.h"
#include "../patchify.h"
#include "common.h"

namespace vlmops {
namespace patchify_binding {

// ((x / 255) - mean) / std as one multiply-add, for each channel.
struct Scales {
  std::vector<float> scale, shift;

  Scales(int64_t channels, at::ArrayRef<double> mean, at::ArrayRef<double> std, bool raw, int64_t repeat) {
    TORCH_CHECK_VALUE((mean.empty() || static_cast<int64_t>(mean.size()) == channels) &&
                          (std.empty() || static_cast<int64_t>(std.size()) == channels),
                      "mean, std: expected ", channels, " values");
    for (int64_t r = 0; r < repeat; ++r) {
      for (int64_t i = 0; i < channels; ++i) {
        const double s = std.empty() ? 1.0 : std[i], m = mean.empty() ? 0.0 : mean[i];
        scale.push_back(static_cast<float>((raw ? 1.0 / 255.0 : 1.0) / s));
        shift.push_back(static_cast<float>(-m / s));
      }
    }
  }
};

// One group of equal images, without its scales and its place in the result.
inline PatchRows group(const char* images, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t patch,
                       int64_t frames, bool merge) {
  const int64_t t = sizes[1], c = sizes[2], h = sizes[3], w = sizes[4];
  TORCH_CHECK_VALUE(t > 0 && h >= 0 && w >= 0 && h % patch == 0 && w % patch == 0,
                    "images: expected multiples of the patch ", patch, ", got ", h, "x", w, " of ", t, " frames");
  PatchRows a{};
  a.images = images;
  a.stride_n = strides[0];
  a.stride_t = strides[1];
  a.stride_c = strides[2];
  a.stride_h = strides[3];
  a.stride_w = strides[4];
  a.frames_in = t;
  a.channels = static_cast<int>(c);
  a.frames = static_cast<int>(frames);
  a.patch = static_cast<int>(patch);
  a.grid_t = static_cast<int>((t + frames - 1) / frames);
  a.grid_h = static_cast<int>(h / patch);
  a.grid_w = static_cast<int>(w / patch);
  a.merge = merge;
  TORCH_CHECK_VALUE(!merge || (a.grid_h % 2 == 0 && a.grid_w % 2 == 0),
                    "images: expected an even grid for 2x2 order, got ", a.grid_h, "x", a.grid_w);
  return a;
}

// images: [n, T, C, H, W]; or all pixels of mixed images in one [pixels], with int64 sizes [n, 4]: T, H, W, and whether
// its memory runs (T, H, W, C). Rows first..last of the result; last < 0: to the end.
inline at::Tensor patch_rows(const at::Tensor& images, const std::optional<at::Tensor>& sizes, int64_t channels,
                             at::ArrayRef<double> mean, at::ArrayRef<double> std, int64_t patch, int64_t frames,
                             bool merge, bool channels_last, int64_t first, int64_t last, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(images.dim() == (sizes.has_value() ? 1 : 5),
                    "images: expected [n, T, C, H, W], or [pixels] and sizes, got ", images.sizes());
  TORCH_CHECK_VALUE(patch > 0 && frames > 0 && channels > 0 && patch < 65536 && frames < 65536 && channels < 65536,
                    "patch_size: expected a size, got ", patch, ", ", frames, " frames, ", channels, " channels");
  const char* data = static_cast<const char*>(images.const_data_ptr());
  std::vector<PatchRows> groups;
  std::vector<int64_t> begins{0};
  if (!sizes.has_value()) {
    TORCH_CHECK_VALUE(images.size(2) == channels, "images: expected ", channels, " channels, got ", images.sizes());
    groups.push_back(group(data, images.sizes(), images.strides(), patch, frames, merge));
    begins.push_back(images.size(0) * groups[0].grid_t * groups[0].grid_h * groups[0].grid_w);
  } else {
    TORCH_CHECK_VALUE(sizes->dim() == 2 && sizes->size(1) == 4 && sizes->scalar_type() == at::kLong &&
                          sizes->is_contiguous() && images.is_contiguous(),
                      "sizes: expected contiguous int64 [n, 4], got ", sizes->sizes());
    const int64_t* s = sizes->const_data_ptr<int64_t>();
    int64_t pixels = 0;
    for (int64_t i = 0; i < sizes->size(0); ++i, s += 4) {
      const int64_t t = s[0], h = s[1], w = s[2], plane = h * w, frame = plane * channels;
      const int64_t extent[] = {1, t, channels, h, w};
      const int64_t planar[] = {0, frame, plane, w, 1}, packed[] = {0, frame, 1, w * channels, channels};
      groups.push_back(
          group(data + pixels * images.element_size(), extent, s[3] != 0 ? packed : planar, patch, frames, merge));
      const PatchRows& a = groups.back();
      begins.push_back(begins.back() + static_cast<int64_t>(a.grid_t) * a.grid_h * a.grid_w);
      pixels += t * frame;
      TORCH_CHECK_VALUE(pixels <= images.numel(), "sizes: more than the ", images.numel(), " pixels there are");
    }
    TORCH_CHECK_VALUE(pixels == images.numel(), "sizes: expected ", images.numel(), " pixels in all, got ", pixels);
  }
  last = last < 0 ? begins.back() : last;
  TORCH_CHECK_VALUE(0 <= first && first <= last && last <= begins.back(), "first, last: expected rows of ",
                    begins.back(), ", got ", first, " and ", last);
  const bool raw = images.scalar_type() == at::kByte;
  const Scales factors(channels, mean, std, raw, channels_last ? patch : 1);
  const int64_t width = channels * frames * patch * patch;
  at::Tensor out = at::empty({last - first, width}, images.options().dtype(dtype));
  const int64_t row_bytes = width * out.element_size();
  char* rows = static_cast<char*>(out.data_ptr());
  for (PatchRows& a : groups) {
    a.channels_last = channels_last;
    a.in_dtype = raw ? kUInt8 : float_dtype(images, "images");
    a.out_dtype = float_dtype(out, "dtype");
    a.scale = factors.scale.data();
    a.shift = factors.shift.data();
  }
  static const auto kernel = VLMOPS_PICK(patch_rows);
  at::parallel_for(first, last, std::max<int64_t>(1, 16384 / width), [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(begins.begin(), begins.end(), begin) - begins.begin() - 1;
    for (; begin < end; ++i) {
      const int64_t stop = std::min(end, begins[i + 1]), base = begins[i];
      PatchRows a = groups[i];
      a.out = rows + (base - first) * row_bytes;  // of the group's first token, which may lie before the rows asked for
      kernel(a, begin - base, stop - base);
      begin = stop;
    }
  });
  return out;
}

// Patch vectors [N, K] that are not normalised yet.
inline at::Tensor normalise_rows(const at::Tensor& given, int64_t channels, at::ArrayRef<double> mean,
                                 at::ArrayRef<double> std, bool channels_last, int64_t first, int64_t last,
                                 at::ScalarType dtype) {
  TORCH_CHECK_VALUE(given.dim() == 2 && channels > 0 && given.size(1) > 0 && given.size(1) % channels == 0,
                    "images: expected [N, K] of ", channels, " channels, got ", given.sizes());
  const at::Tensor x = given.stride(1) == 1 ? given : given.contiguous();
  last = last < 0 ? x.size(0) : last;
  TORCH_CHECK_VALUE(0 <= first && first <= last && last <= x.size(0), "first, last: expected rows of ", x.size(0),
                    ", got ", first, " and ", last);
  const bool raw = x.scalar_type() == at::kByte;
  const int64_t width = x.size(1), pixels = width / channels;
  int64_t line =
      1;  // pixels of a run of channels_last: the longest power of two up to 64 that divides, not one pixel at a time
  while (channels_last && line < 64 && pixels % (2 * line) == 0) line *= 2;
  const Scales factors(channels, mean, std, raw, line);
  at::Tensor out = at::empty({last - first, width}, x.options().dtype(dtype));
  NormaliseRows a{};
  a.rows = static_cast<const char*>(x.const_data_ptr()) + first * x.stride(0) * x.element_size();
  a.out = out.data_ptr();
  a.stride = x.stride(0);
  a.length = channels_last ? line * channels : pixels;
  a.runs = width / a.length;
  a.repeated = channels_last;
  a.in_dtype = raw ? kUInt8 : float_dtype(x, "images");
  a.out_dtype = float_dtype(out, "dtype");
  a.scale = factors.scale.data();
  a.shift = factors.shift.data();
  static const auto kernel = VLMOPS_PICK(normalise_rows);
  at::parallel_for(0, last - first, std::max<int64_t>(1, 16384 / width),
                   [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace patchify_binding
}  // namespace vlmops

TORCH_LIBRARY_IMPL(vlmops_cpu, CPU, m) {
  m.impl("patch_rows", &vlmops::patchify_binding::patch_rows);
  m.impl("normalise_rows", &vlmops::patchify_binding::normalise_rows);
}
