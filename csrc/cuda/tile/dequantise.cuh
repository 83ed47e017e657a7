// Weights in few bits (vlmops/ops/_shared/quantisation.py has the layouts): their codes as floats, exactly.
//
// Where a byte is an integer it becomes the low mantissa byte of 2^23, and one subtraction takes off 2^23 and the
// zero-point together. e4m3 becomes fp16 by moving bits, which is right but for a factor 2^8 that the scale takes in.
#pragma once

#include "../ptx/memory.cuh"
#include "sources.cuh"

namespace vlmops {

// Bytes of a (numbers 0 to 3) and b (4 to 7), named by the hexadecimal digits of `which`, the lowest byte by the last.
VLMOPS_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t which) {
#ifdef VLMOPS_SIMT
  const uint64_t both = a | static_cast<uint64_t>(b) << 32;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= static_cast<uint32_t>(both >> (which >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
  return picked;
#else
  return __byte_perm(a, b, which);
#endif
}

enum class Code { int8, int4, fp8 };

// Four bytes of 0 .. 255 less `offset`, which is 2^23 and what stands for zero.
VLMOPS_DEVICE void integers(float* to, uint32_t bytes, float offset) {
  VLMOPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    to[i] = bits_float(pick_bytes(bytes, 0x4b000000u, 0x7440u + static_cast<uint32_t>(i))) - offset;
  }
}

// How a row of codes lies: columns come in Runs runs of neighbours an access, kApart columns from one to the next.
template <Code C>
struct Codes {  // int8
  static constexpr int kRuns = 1, kApart = 0;
  static constexpr float kOffset = 8388608.f, kZero = 128.f, kFactor = 1.f;
  VLMOPS_DEVICE_MEMBER static int column_of(int byte) { return byte; }
  VLMOPS_DEVICE_MEMBER static void decode(float* to, uint32_t word, int, float offset) {
    integers(to, word ^ 0x80808080u, offset);
  }
  VLMOPS_DEVICE_MEMBER static uint32_t nan(uint32_t) { return 0; }
};

template <>
struct Codes<Code::int4> {  // byte 64 b + j: columns 128 b + j and 128 b + 64 + j
  static constexpr int kRuns = 2, kApart = 64;
  static constexpr float kOffset = 8388608.f, kZero = 8.f, kFactor = 1.f;
  VLMOPS_DEVICE_MEMBER static int column_of(int byte) { return byte + (byte & ~63); }
  VLMOPS_DEVICE_MEMBER static void decode(float* to, uint32_t word, int run, float offset) {
    integers(to, word >> 4 * run & 0x0f0f0f0fu, offset);
  }
  VLMOPS_DEVICE_MEMBER static uint32_t nan(uint32_t) { return 0; }
};

template <>
struct Codes<Code::fp8> {
  static constexpr int kRuns = 1, kApart = 0;
  static constexpr float kOffset = 0.f, kZero = 0.f, kFactor = 256.f;
  VLMOPS_DEVICE_MEMBER static int column_of(int byte) { return byte; }
  VLMOPS_DEVICE_MEMBER static void decode(float* to, uint32_t word, int, float) {
    VLMOPS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t high = pick_bytes(word, 0u, i == 0 ? 0x1404u : 0x3424u);  // a byte at the top of each half
      const uint32_t pair = (high & 0x80008000u) | (high >> 1 & 0x3f803f80u);
      to[2 * i] = unpack_low<fp16>(pair);
      to[2 * i + 1] = unpack_high<fp16>(pair);
    }
  }
  // Not 0 where one of the bytes is 0x7f or 0xff, which stand for NaN and which `decode` does not know.
  VLMOPS_DEVICE_MEMBER static uint32_t nan(uint32_t word) { return ((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u; }
};

// A weight [N, K] in few bits, its rows `stride` bytes apart; scale and zero [groups, N]. Zero may be null.
struct PackedWeight {
  const uint8_t* data;
  const float* scale;
  const uint8_t* zero;
  int64_t stride;
  int n;
};

// Columns n0 .. n0 + Columns of a product as GemmTile::run_of has its sources: 16 bytes of the weight an access,
// decoded to T on their way into the tile. A step along k is 64 columns; an int4 access serves two steps, one half of
// each byte to a step. Group 0: without the scale, which is then the same for a column of the product. Columns past n
// are the last one again.
template <class T, Code C, int Group, int Columns, int Threads>
struct DequantisedRows {
  static constexpr int kStep = 64, kAtOnce = Threads / 4, kEach = Columns / kAtOnce;
  static_assert(Threads % 4 == 0 && Columns % kAtOnce == 0, "as much for each thread");
  using Weight = Codes<C>;
  const PackedWeight& weight;
  int column[kEach];
  Vec<uint32_t, 4> words[kEach];
  float scale[kEach], offset[kEach];

  VLMOPS_DEVICE_MEMBER static int slot(int i) { return static_cast<int>(threadIdx.x) / 4 + i * kAtOnce; }
  VLMOPS_DEVICE_MEMBER static int part() { return static_cast<int>(threadIdx.x) % 4; }

  VLMOPS_DEVICE_MEMBER DequantisedRows(const PackedWeight& from, int n0) : weight(from) {
    VLMOPS_UNROLL
    for (int i = 0; i < kEach; ++i) {
      column[i] = min_of(n0 + column_of_slot(slot(i)), weight.n - 1);
      load_terms(i, 0);
    }
  }
  VLMOPS_DEVICE_MEMBER void load_terms(int i, int group) {
    const int64_t at = static_cast<int64_t>(group) * weight.n + column[i];
    scale[i] = Group == 0 ? 1.f : weight.scale[at] * Weight::kFactor;
    offset[i] = Weight::kOffset + (weight.zero != nullptr ? static_cast<float>(weight.zero[at]) : Weight::kZero);
  }
  template <class Tile>
  VLMOPS_DEVICE_MEMBER void start(const Tile&, int k, int) {
    VLMOPS_UNROLL
    for (int i = 0; i < kEach; ++i) {
      if (Weight::kRuns == 1 || k % (2 * kStep) == 0) {
        const uint8_t* from = weight.data + column[i] * weight.stride + k / Weight::kRuns + part() * 16;
        words[i] = load_vec_readonly<4>(reinterpret_cast<const uint32_t*>(from));
      }
      if constexpr (Group != 0) load_terms(i, (k + part() * 16) / max_of(1, Group));
    }
  }
  template <class Tile>
  VLMOPS_DEVICE_MEMBER void finish(const Tile& tile, int k) {
    VLMOPS_UNROLL
    for (int i = 0; i < kEach; ++i) {
      VLMOPS_UNROLL
      for (int half = 0; half < 2; ++half) {
        float w[8];
        VLMOPS_UNROLL
        for (int j = 0; j < 8; j += 4) {
          const uint32_t word = words[i][half * 2 + j / 4];
          Weight::decode(w + j, word, k / kStep % Weight::kRuns, offset[i]);
          if (Weight::nan(word) != 0) {
            VLMOPS_UNROLL
            for (int b = 0; b < 4; ++b) {
              if ((word >> 8 * b & 0x7fu) == 0x7fu) w[j + b] = bits_float(0x7fffffffu);
            }
          }
        }
        Vec<T, 8> whole;
        VLMOPS_UNROLL
        for (int j = 0; j < 8; ++j) whole[j] = from_float<T>(Group == 0 ? w[j] : w[j] * scale[i]);
        store_vec<8>(tile.at(slot(i), part() * 2 + half), whole);
      }
    }
  }
};

}  // namespace vlmops
