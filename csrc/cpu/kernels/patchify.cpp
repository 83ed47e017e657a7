// Pixels to patch vectors: each pixel is read once, converted, normalised, rounded and put in its place.
#include "../patchify.h"

#include "../simd.h"

namespace vlmops {
namespace VLMOPS_ISA {
namespace {

constexpr int kLine = 256;  // elements gathered at once where a line is not dense

// to[i] = from[i] * scale + shift. The last vector overlaps the one before: cheaper than a masked rest on most sets.
template <class In, class Out>
VLMOPS_INLINE void run(const In* from, Out* to, long long n, Vec scale, Vec shift) {
  if (n < kLanes) return store_n(to, fma(load_n(from, static_cast<int>(n)), scale, shift), static_cast<int>(n));
  for (long long i = 0; i < n; i += kLanes) {
    const long long at = i + kLanes <= n ? i : n - kLanes;
    store(to + at, fma(load(from + at), scale, shift));
  }
}

// The same with a scale and a shift for every element.
template <class In, class Out>
VLMOPS_INLINE void run_each(const In* from, Out* to, long long n, const float* scale, const float* shift) {
  if (n < kLanes) {
    const int k = static_cast<int>(n);
    return store_n(to, fma(load_n(from, k), load_n(scale, k), load_n(shift, k)), k);
  }
  for (long long i = 0; i < n; i += kLanes) {
    const long long at = i + kLanes <= n ? i : n - kLanes;
    store(to + at, fma(load(from + at), load(scale + at), load(shift + at)));
  }
}

template <class In, class Out>
VLMOPS_INLINE void strided_run(const In* from, long long stride, Out* to, long long n, Vec scale, Vec shift) {
  In line[kLine];
  for (long long i = 0; i < n; i += kLine) {
    const int k = n - i < kLine ? static_cast<int>(n - i) : kLine;
    if (stride == 3) {  // a constant: the compiler makes shuffles of it
      for (int j = 0; j < k; ++j) line[j] = from[(i + j) * 3];
    } else {
      for (int j = 0; j < k; ++j) line[j] = from[(i + j) * stride];
    }
    run(static_cast<const In*>(line), to + i, k, scale, shift);
  }
}

// A line of pixels with their channels beside each other.
template <class In, class Out>
VLMOPS_INLINE void interleaved_line(const PatchRows& a, const In* from, Out* to) {
  const long long n = static_cast<long long>(a.patch) * a.channels;
  if ((a.stride_c == 1 || a.channels == 1) && (a.stride_w == a.channels || a.patch == 1))
    return run_each(from, to, n, a.scale, a.shift);
  In line[kLine];
  const In* pixel = from;
  int c = 0;
  for (long long i = 0; i < n; i += kLine) {
    const int k = n - i < kLine ? static_cast<int>(n - i) : kLine;
    for (int j = 0; j < k; ++j) {
      line[j] = pixel[c * a.stride_c];
      if (++c == a.channels) {
        c = 0;
        pixel += a.stride_w;
      }
    }
    run_each(static_cast<const In*>(line), to + i, k, a.scale + i, a.shift + i);
  }
}

template <class In, class Out>
void tokens(const PatchRows& a, long long first, long long last) {
  const long long per_frame = static_cast<long long>(a.grid_h) * a.grid_w;
  const long long area = static_cast<long long>(a.patch) * a.patch;
  const long long length = area * a.frames * a.channels;
  const bool gathered = a.channels_last ? a.stride_c != 1 && a.channels != 1 : a.stride_w != 1;
  for (long long token = first; token < last; ++token) {
    const long long group = token / per_frame, rest = token % per_frame;
    const long long image = group / a.grid_t, time = group % a.grid_t;
    long long row = rest / a.grid_w, col = rest % a.grid_w;
    if (a.merge) {  // blocks row by row, in a block row by row
      const long long block = rest / 4, inner = rest % 4, blocks = a.grid_w / 2;
      row = block / blocks * 2 + inner / 2;
      col = block % blocks * 2 + inner % 2;
    }
    const In* corner =
        static_cast<const In*>(a.images) + image * a.stride_n + row * a.patch * a.stride_h + col * a.patch * a.stride_w;
    Out* to = static_cast<Out*>(a.out) + token * length;
    for (int f = 0; f < a.frames; ++f) {
      long long frame = time * a.frames + f;
      frame = frame < a.frames_in ? frame : a.frames_in - 1;  // the last frame fills up
      // A repeated frame is in place already; where its pixels are dense, reading them again is faster than copying
      // vectors that were written a moment ago.
      if (gathered && f > 0 && time * a.frames + f >= a.frames_in) {
        const long long blocks = a.channels_last ? 1 : a.channels, size = a.channels_last ? area * a.channels : area;
        for (long long b = 0; b < blocks; ++b) {
          Out* block = to + (b * a.frames + f) * size;
          __builtin_memcpy(block, block - size, static_cast<unsigned long>(size) * sizeof(Out));
        }
        continue;
      }
      const In* from = corner + frame * a.stride_t;
      if (a.channels_last) {
        for (int y = 0; y < a.patch; ++y)
          interleaved_line(a, from + y * a.stride_h, to + (f * area + y * a.patch) * a.channels);
        continue;
      }
      for (int c = 0; c < a.channels; ++c) {
        const Vec scale = set1(a.scale[c]), shift = set1(a.shift[c]);
        const In* plane = from + c * a.stride_c;
        Out* out = to + (static_cast<long long>(c) * a.frames + f) * area;
        for (int y = 0; y < a.patch; ++y, plane += a.stride_h, out += a.patch) {
          if (a.stride_w == 1) run(plane, out, a.patch, scale, shift);
          else strided_run(plane, a.stride_w, out, a.patch, scale, shift);
        }
      }
    }
  }
}

template <class In, class Out>
void tokens(const NormaliseRows& a, long long first, long long last) {
  for (long long r = first; r < last; ++r) {
    const In* from = static_cast<const In*>(a.rows) + r * a.stride;
    Out* to = static_cast<Out*>(a.out) + r * a.runs * a.length;
    for (long long i = 0; i < a.runs; ++i, from += a.length, to += a.length) {
      if (a.repeated) run_each(from, to, a.length, a.scale, a.shift);
      else run(from, to, a.length, set1(a.scale[i]), set1(a.shift[i]));
    }
  }
}

template <class In, class Args>
void by_output(const Args& a, long long first, long long last) {
  switch (a.out_dtype) {
    case kFloat32: tokens<In, float>(a, first, last); break;
    case kBFloat16: tokens<In, BF16>(a, first, last); break;
    default: tokens<In, FP16>(a, first, last); break;
  }
}

template <class Args>
void by_input(const Args& a, long long first, long long last) {
  switch (a.in_dtype) {
    case kFloat32: by_output<float>(a, first, last); break;
    case kBFloat16: by_output<BF16>(a, first, last); break;
    case kFloat16: by_output<FP16>(a, first, last); break;
    default: by_output<vlmops_u8>(a, first, last); break;
  }
}

}  // namespace

void patch_rows(const PatchRows& a, long long first, long long last) { by_input(a, first, last); }
void normalise_rows(const NormaliseRows& a, long long first, long long last) { by_input(a, first, last); }

}  // namespace VLMOPS_ISA
}  // namespace vlmops
