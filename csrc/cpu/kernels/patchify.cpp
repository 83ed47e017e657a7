// Pixels to patch vectors: each pixel is read once, converted, normalised, rounded and put in its place.
#include "../patchify.h"

#include "../simd.h"

namespace vlmops {
namespace VLMOPS_ISA {

template <class In, class Out>
static void token_rows(const PatchRows& a, long long first, long long last) {
  const In* images = static_cast<const In*>(a.images);
  Out* out = static_cast<Out*>(a.out);
  const long long per_frame = static_cast<long long>(a.grid_h) * a.grid_w;
  const long long area = static_cast<long long>(a.patch) * a.patch;
  const long long length = area * a.frames * a.channels;
  for (long long token = first; token < last; ++token) {
    const long long group = token / per_frame, rest = token % per_frame;
    const long long image = group / a.grid_t, time = group % a.grid_t;
    long long row, col;
    if (a.merge) {  // blocks row by row, in a block row by row
      const long long block = rest / 4, inner = rest % 4, blocks = a.grid_w / 2;
      row = block / blocks * 2 + inner / 2;
      col = block % blocks * 2 + inner % 2;
    } else {
      row = rest / a.grid_w;
      col = rest % a.grid_w;
    }
    Out* to = out + token * length;
    for (int c = 0; c < a.channels; ++c) {
      const Vec scale = set1(a.scale[c]), shift = set1(a.shift[c]);
      for (int f = 0; f < a.frames; ++f) {
        long long frame = time * a.frames + f;
        frame = frame < a.frames_in ? frame : a.frames_in - 1;  // the last frame fills up
        const In* from = images + image * a.stride_n + frame * a.stride_t + c * a.stride_c + row * a.patch * a.stride_h + col * a.patch;
        for (int y = 0; y < a.patch; ++y, from += a.stride_h) {
          if (a.channels_last) {
            Out* pixel = to + (static_cast<long long>(f) * area + y * a.patch) * a.channels + c;
            for (int x = 0; x < a.patch; ++x) store_n(pixel + x * a.channels, fma(load_n(from + x, 1), scale, shift), 1);
            continue;
          }
          Out* line = to + (static_cast<long long>(c) * a.frames + f) * area + y * a.patch;
          int x = 0;
          for (; x + kLanes <= a.patch; x += kLanes) store(line + x, fma(load(from + x), scale, shift));
          if (x < a.patch) store_n(line + x, fma(load_n(from + x, a.patch - x), scale, shift), a.patch - x);
        }
      }
    }
  }
}

template <class In>
static void by_output(const PatchRows& a, long long first, long long last) {
  switch (a.out_dtype) {
    case kFloat32: token_rows<In, float>(a, first, last); break;
    case kBFloat16: token_rows<In, BF16>(a, first, last); break;
    default: token_rows<In, FP16>(a, first, last); break;
  }
}

void patch_rows(const PatchRows& a, long long first, long long last) {
  switch (a.in_dtype) {
    case kFloat32: by_output<float>(a, first, last); break;
    case kBFloat16: by_output<BF16>(a, first, last); break;
    case kFloat16: by_output<FP16>(a, first, last); break;
    default: by_output<vlmops_u8>(a, first, last); break;
  }
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
