// Patch vectors of images as rows of a product, read where the pixels lie: no patch vector is ever written.
//
// An address is the sum of a patch's first pixel and the steps of an element's frame, channel, line and column. What
// images, patches and elements of a patch vector are is known to the compiler: its divisions are by constants.
#pragma once

#include "../ptx/math.cuh"
#include "../ptx/memory.cuh"

namespace vlmops {

VLMOPS_DEVICE float to_float(uint8_t x) { return static_cast<float>(x); }

enum class Form {
  rows,   // patch vectors already
  stack,  // [n, T, C, H, W] with any strides
  buffer  // images of mixed sizes behind each other, (T, C, H, W) or (T, H, W, C) each, told by a table
};

// Elements from one of what the name says to the next.
struct PixelSteps {
  int64_t frame, channel, line, column;
};

// Where a patch begins. last: the last frame its image has from there on; -1 where there is no patch.
template <class Pixel>
struct PatchStart {
  const Pixel* from;
  PixelSteps steps;  // of a buffer, whose images have their own
  int last;
};

// What the compiler knows of images and patches.
//   Merge: tokens run through 2 x 2 blocks. Last: a patch vector runs (frame, line, column, channel). Line: a line of a
//   patch is one run in memory as in the patch vector, channels and all. Wide: elements of an access, which lie
//   together and are aligned. Normalise: pixels are shifted and scaled.
template <class Pixel_, Form F, int Channels_, int Frames_, int Side_, bool Merge_, bool Last_, bool Line_, int Wide_,
          bool Normalise_>
struct PatchShape {
  using Pixel = Pixel_;
  static constexpr Form kForm = F;
  static constexpr int kChannels = Channels_, kFrames = Frames_, kSide = Side_, kArea = Side_ * Side_, kWide = Wide_;
  static constexpr int kLength = kChannels * kFrames * kArea;
  static constexpr bool kMerge = Merge_, kLast = Last_, kLine = Line_, kNormalise = Normalise_;
  static constexpr int kInRegisters = 4;  // channels whose statistics are kernel arguments
};

// What a pixel is less by, and what the rest is multiplied with, of each channel: of up to four in registers, of more
// in memory as pairs.
struct Statistics {
  float shift[4], scale[4];
  const float* pairs;  // [C, 2]
};

// Images and their grids of patches.
template <class Shape>
struct Patches {
  using Pixel = typename Shape::Pixel;
  const Pixel* images;
  const int64_t* table;  // [n, 6] of a buffer: first token, first element, T, patches down, patches across, (H, W, C)
  int tokens, n;
  int of_image, of_frame, of_line, frames;  // of a stack: patches, and how many frames an image has
  int64_t image;                            // elements between two images, or two rows
  PixelSteps steps;
  Statistics statistics;

  // Of one token; what is outside begins nowhere.
  VLMOPS_DEVICE_MEMBER PatchStart<Pixel> start(int token) const {
    PatchStart<Pixel> found{images, steps, token < tokens ? 0 : -1};
    if (token >= tokens) return found;
    if constexpr (Shape::kForm == Form::rows) {
      found.from += token * image;
    } else {
      int of_frame_ = of_frame, across = of_line, inside = token, length = frames;
      if constexpr (Shape::kForm == Form::stack) {
        found.from += token / of_image * image;
        inside = token % of_image;
      } else {
        const int64_t* const entry = table + image_of(token) * 6;
        inside = token - static_cast<int>(entry[0]);
        length = static_cast<int>(entry[2]);
        across = static_cast<int>(entry[4]);
        of_frame_ = static_cast<int>(entry[3]) * across;
        const int64_t plane = static_cast<int64_t>(of_frame_) * Shape::kArea, line = int64_t{1} * across * Shape::kSide;
        found.from += entry[1];
        found.steps.frame = plane * Shape::kChannels;
        const bool turned = entry[5] != 0;
        found.steps.channel = turned ? 1 : plane;
        found.steps.line = turned ? line * Shape::kChannels : line;
        found.steps.column = turned ? Shape::kChannels : 1;
      }
      const int first = inside / of_frame_ * Shape::kFrames, cell = inside % of_frame_;
      int y = cell / across, x = cell % across;
      if constexpr (Shape::kMerge) {
        const int block = cell / 4, half = across / 2;
        y = block / half * 2 + cell % 4 / 2;
        x = block % half * 2 + cell % 2;
      }
      found.from += first * found.steps.frame + static_cast<int64_t>(y) * Shape::kSide * found.steps.line +
                    static_cast<int64_t>(x) * Shape::kSide * found.steps.column;
      found.last = length - 1 - first;
    }
    return found;
  }

  // Where element k of a patch vector is.
  VLMOPS_DEVICE_MEMBER const Pixel* at(const PatchStart<Pixel>& patch, int k) const {
    if constexpr (Shape::kForm == Form::rows) {
      return patch.from + k * steps.column;
    } else {
      constexpr int kAcross = Shape::kLine ? Shape::kSide * Shape::kChannels : Shape::kSide;
      const int spread = Shape::kLast && !Shape::kLine ? k / Shape::kChannels : k;  // without channels that run first
      const int x = spread % kAcross, y = spread / kAcross % Shape::kSide;
      const int f = spread / (kAcross * Shape::kSide) % Shape::kFrames;
      const PixelSteps& by = Shape::kForm == Form::buffer ? patch.steps : steps;
      int64_t offset = y * by.line;
      if constexpr (Shape::kLine || Shape::kWide > 1) {
        offset += x;  // what is read together lies together
      } else {
        offset += x * by.column;
      }
      if constexpr (!Shape::kLine && Shape::kChannels > 1) offset += channel(k) * by.channel;
      if constexpr (Shape::kFrames > 1) offset += min_of(f, patch.last) * by.frame;
      return patch.from + offset;
    }
  }

  VLMOPS_DEVICE_MEMBER static int channel(int k) {
    return Shape::kLast ? k % Shape::kChannels : k / (Shape::kArea * Shape::kFrames);
  }

  // A pixel of channel c as the product takes it.
  VLMOPS_DEVICE_MEMBER float normalise(float x, int c) const {
    float shift = statistics.shift[0], scale = statistics.scale[0];
    if constexpr (Shape::kChannels <= Shape::kInRegisters) {
      VLMOPS_UNROLL
      for (int i = 1; i < Shape::kChannels; ++i) {
        if (c == i) {
          shift = statistics.shift[i];
          scale = statistics.scale[i];
        }
      }
    } else {
      const auto pair = load_vec_readonly<2>(statistics.pairs + 2 * c);
      shift = pair[0];
      scale = pair[1];
    }
    return (x - shift) * scale;
  }

  // Wide pixels from element k on, in a row's type.
  template <class T, int Wide>
  VLMOPS_DEVICE_MEMBER Vec<T, Wide> convert(const Vec<Pixel, Wide>& pixels, int k) const {
    Vec<T, Wide> to;
    VLMOPS_UNROLL
    for (int i = 0; i < Wide; ++i) {
      const float x = to_float(pixels[i]);
      if constexpr (!Shape::kNormalise) {
        to[i] = from_float<T>(x);
      } else {  // neighbours are of one channel, or channels run first
        to[i] = from_float<T>(normalise(x, channel(Shape::kLast ? k + i : k)));
      }
    }
    return to;
  }

 private:
  // The last image whose first token is not behind this one: those without patches are passed over.
  VLMOPS_DEVICE_MEMBER int image_of(int token) const {
    int low = 0, high = n - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (table[middle * 6] <= token) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

}  // namespace vlmops
