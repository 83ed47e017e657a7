// The tiles of a product of patch vectors and a weight: how a GemmTile gets both (GemmTile::run_of).
#pragma once

#include "../ptx/memory.cuh"
#include "gemm.cuh"
#include "pixels.cuh"
#include "swizzled.cuh"

namespace vlmops {

template <class A, class B>
constexpr bool kSameType = false;
template <class A>
constexpr bool kSameType<A, A> = true;

// A value as the compiler does not know it: what is made of it is computed where it is used, and holds no registers for
// a whole loop.
template <class X>
VLMOPS_DEVICE X fresh(X x) {
#ifndef VLMOPS_SIMT
  if constexpr (sizeof(X) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
#endif
  return x;
}

// How Threads threads share out a tile of Rows rows, Wide elements each: neighbours along a row, always the same part
// of it, so that rows of which only so many elements are aligned are read in whole sectors too.
template <class T, int Rows, int Chunks, int Threads, int Wide>
struct Spread {
  static constexpr int kParts = Chunks * 8 / Wide, kAtOnce = Threads / kParts, kEach = Rows / kAtOnce;
  static_assert(Threads % kParts == 0 && Rows % kAtOnce == 0 && (kAtOnce & (kAtOnce - 1)) == 0, "as much for each");
  int row, part;  // of this thread: the first of its rows, the first of its elements

  VLMOPS_DEVICE_MEMBER Spread() {
    const int thread = fresh(static_cast<int>(threadIdx.x));
    row = thread / kParts;
    part = thread % kParts * Wide;
  }
  VLMOPS_DEVICE_MEMBER int row_of(int i) const { return row + i * kAtOnce; }
  VLMOPS_DEVICE_MEMBER T* place(const SwizzledTile<T, Chunks>& tile, int i) const {
    T* const chunk = kAtOnce % 8 == 0 ? tile.at(i * kAtOnce, row, part / 8) : tile.at(row_of(i), part / 8);
    return chunk + part % 8;
  }
};

// Fills the tile of A of a GemmTile with patch vectors. Pixels that need no change go by cp.async; others wait in
// registers while the block multiplies, and are written, converted, after that.
template <class T, class Shape, int Rows, int Chunks, int Threads>
struct PatchRows {
  using Pixel = typename Shape::Pixel;
  using Share = Spread<T, Rows, Chunks, Threads, Shape::kWide>;
  static constexpr int kWide = Shape::kWide, kEach = Share::kEach;
  static constexpr bool kSame = kSameType<T, Pixel> && !Shape::kNormalise, kDirect = kSame && kWide > 1;
  static_assert(kEach <= 32, "a bit for each");

  const Patches<Shape>& patches;
  const PatchStart<Pixel>* starts;  // [Rows], shared memory
  Vec<Pixel, kWide> staged[kDirect ? 1 : kEach];
  uint32_t inside;  // a bit for each of staged

  VLMOPS_DEVICE_MEMBER PatchRows(const Patches<Shape>& patches_, const PatchStart<Pixel>* starts_)
      : patches(patches_), starts(starts_), inside(0) {}

  // Starts elements k .. k + 8 Chunks of `length`.
  VLMOPS_DEVICE_MEMBER void start(const SwizzledTile<T, Chunks>& tile, int k, int length) {
    const Share mine;
    const int first = k + mine.part;
    inside = 0;
    VLMOPS_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const PatchStart<Pixel>& patch = starts[mine.row_of(i)];
      const bool valid = first < length && patch.last >= 0;
      if constexpr (kDirect) {
        cp_async<kWide * sizeof(T)>(mine.place(tile, i), valid ? patches.at(patch, first) : patches.images, valid);
      } else if (valid) {
        staged[i] = load_vec_readonly<kWide>(patches.at(patch, first));
        inside |= 1u << i;
      }
    }
  }

  // Writes what was started; where there was no pixel, zeros.
  VLMOPS_DEVICE_MEMBER void finish(const SwizzledTile<T, Chunks>& tile, int k) {
    if constexpr (!kDirect) {
      const Share mine;
      VLMOPS_UNROLL
      for (int i = 0; i < kEach; ++i) {
        Vec<T, kWide> whole = {};
        if ((inside >> i & 1u) != 0) {
          if constexpr (kSame) {
            whole = staged[i];
          } else {
            whole = patches.template convert<T>(staged[i], k + mine.part);
          }
        }
        store_vec<kWide>(mine.place(tile, i), whole);
      }
    }
  }
};

// Fills the tile of B with rows of a weight [n, K] in the order of column_of_slot. A slot's bits are bits of its
// column, so that a thread's columns are constants apart.
template <class T, int Rows, int Chunks, int Threads, int Wide>
struct WeightRows {
  using Share = Spread<T, Rows, Chunks, Threads, Wide>;
  const T* weight;
  const T* from;  // this thread's part of its first row
  int64_t stride;
  int left;  // rows from there on

  VLMOPS_DEVICE_MEMBER WeightRows(const T* weight_, int64_t stride_, int first, int n)
      : weight(weight_), stride(stride_) {
    const Share mine;
    const int row = first + column_of_slot(mine.row);
    from = weight + row * stride + mine.part;
    left = n - row;
  }

  VLMOPS_DEVICE_MEMBER void start(const SwizzledTile<T, Chunks>& tile, int k, int length) const {
    const Share mine;
    const bool inside = k + mine.part < length;
    const int64_t apart = fresh(stride);
    VLMOPS_UNROLL_N((Wide > 1 ? Share::kEach : 4))  // all at once, single elements would spill
    for (int i = 0; i < Share::kEach; ++i) {
      const int later = column_of_slot(i * Share::kAtOnce);
      const bool valid = inside && later < left;
      const T* const source = valid ? from + later * apart + k : weight;
      if constexpr (Wide > 1) {
        cp_async<Wide * sizeof(T)>(mine.place(tile, i), source, valid);
      } else {
        store_vec<1>(mine.place(tile, i), valid ? load_vec_readonly<1>(source) : Vec<T, 1>{});
      }
    }
  }
  VLMOPS_DEVICE_MEMBER void finish(const SwizzledTile<T, Chunks>&, int) const {}
};

}  // namespace vlmops
