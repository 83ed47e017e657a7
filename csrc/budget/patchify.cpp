#include "driver.h"

#include "../cpu/patchify.h"

using namespace vlmops;
using namespace vlmops::budget;

namespace {

constexpr int kChannels = 3;

struct Case {
  const char* name;
  int in, patch, frames;
  long long frames_in;
  bool packed;         // pixels of a channel beside those of the others
  bool channels_last;  // in a patch vector
  int merge;
};

// Qwen2-VL's images of one frame, from bytes of either layout and from floats; a ViT's; Fuyu's channel order.
constexpr Case kCases[] = {
    {"qwen planar 4x4x14", kUInt8, 14, 2, 1, false, false, 1}, {"qwen packed 4x4x14", kUInt8, 14, 2, 1, true, false, 1},
    {"qwen video 4x4x14", kUInt8, 14, 2, 2, false, false, 1},  {"vit 4x4x16", kFloat32, 16, 1, 1, false, false, 0},
    {"fuyu packed 4x4x30", kUInt8, 30, 1, 1, true, true, 0},
};

void images(const Case& c, int dtype) {
  constexpr int kGrid = 4;
  const long long side = static_cast<long long>(kGrid) * c.patch, plane = side * side, frame = plane * kChannels;
  const long long width = static_cast<long long>(kChannels) * c.frames * c.patch * c.patch, tokens = kGrid * kGrid;
  PatchRows a{};
  a.images = numbers(c.in, c.frames_in * frame);
  a.out = room(tokens * width * bytes(dtype));
  a.stride_n = c.frames_in * frame;
  a.stride_t = frame;
  a.stride_c = c.packed ? 1 : plane;
  a.stride_h = c.packed ? side * kChannels : side;
  a.stride_w = c.packed ? kChannels : 1;
  a.frames_in = c.frames_in;
  a.channels = kChannels;
  a.frames = c.frames;
  a.patch = c.patch;
  a.grid_t = 1;
  a.grid_h = a.grid_w = kGrid;
  a.merge = c.merge;
  a.channels_last = c.channels_last;
  a.in_dtype = c.in;
  a.out_dtype = dtype;
  a.scale = floats(static_cast<long long>(c.patch) * kChannels);
  a.shift = floats(static_cast<long long>(c.patch) * kChannels);
  count("patch_rows", std::string(c.name) + " " + name(c.in) + " to " + name(dtype), a.out, dtype, tokens * width,
        [&] { kernels::patch_rows(a, 0, tokens); });
}

// Qwen2-VL's flattened patches: each channel a run; or naflex's, channels beside each other.
void rows(bool repeated, int in, int dtype) {
  constexpr long long kRows = 16;
  NormaliseRows a{};
  a.runs = repeated ? 14 : kChannels;
  a.length = repeated ? 14 * kChannels : 2 * 14 * 14;
  a.stride = a.runs * a.length;
  const long long n = kRows * a.stride;
  a.rows = numbers(in, n);
  a.out = room(n * bytes(dtype));
  a.repeated = repeated;
  a.in_dtype = in;
  a.out_dtype = dtype;
  a.scale = floats(a.length);
  a.shift = floats(a.length);
  const char* kind = repeated ? "channels beside each other 16x588 " : "channels apart 16x1176 ";
  count("normalise_rows", std::string(kind) + name(in) + " to " + name(dtype), a.out, dtype, n,
        [&] { kernels::normalise_rows(a, 0, kRows); });
}

}  // namespace

int main() {
  for (const int dtype : kFloats) {
    for (const Case& c : kCases) images(c, dtype);
    for (const bool repeated : {false, true}) {
      rows(repeated, kUInt8, dtype);
      rows(repeated, dtype, dtype);
    }
  }
}
