// Bringing q, k and v into the cells that the tiles of varlen_attention read: conversion, rotary embedding, layout.
#pragma once

#include "../gemm/tile.h"
#include "../varlen_attention.h"

namespace vlmops {
namespace VLMOPS_ISA {

typedef long long i64;

constexpr int kMaxDim = 512;
static const float kZeros[kMaxDim] = {};

VLMOPS_INLINE Vec round_as(const float*, Vec v) { return v; }
VLMOPS_INLINE Vec round_as(const BF16*, Vec v) { return round_bf16(v); }
VLMOPS_INLINE Vec round_as(const FP16*, Vec v) { return round_fp16(v); }

VLMOPS_INLINE i64 round_up(i64 x, i64 to) { return (x + to - 1) / to * to; }
VLMOPS_INLINE int smaller(int a, int b) { return a < b ? a : b; }

// Rows that will be needed soon, fetched a few at a time while other work runs. The rows of one head lie a token's
// stride apart, too far for the processor's own prefetch.
struct Ahead {
  struct Rows {
    const char* at;
    i64 stride, left;
    bool write;
  };
  static constexpr int kStreams = 4;
  static constexpr int kRowsPerStep = 6;
  Rows rows[kStreams];
  int count, now, bytes;

  static inline __attribute__((always_inline)) void fetch(const char* at, int bytes, bool write) {
    for (int x = 0; x < bytes; x += 64) write ? __builtin_prefetch(at + x, 1) : __builtin_prefetch(at + x, 0);
    __builtin_prefetch(at + bytes - 1, 0);
  }
  void clear(int row_bytes) { count = now = 0, bytes = row_bytes; }
  void add(const void* at, i64 stride, i64 left, bool write) {
    if (count < kStreams && left > 0) rows[count++] = {static_cast<const char*>(at), stride, left, write};
  }
  void step() {
    if (now == count) return;
    Rows& r = rows[now];
    for (int i = 0; i < kRowsPerStep && r.left > 0; ++i, --r.left, r.at += r.stride) fetch(r.at, bytes, r.write);
    if (r.left == 0) ++now;
  }
};

// Rotary tables at one token; null where there are none.
struct Angles {
  const float* cos;
  const float* sin;
};

// dst = rotate(src), computed in float32 and rounded to the input's type as transformers does.
template <class T, class U>
static void rotate_row(const T* src, U* dst, int dim, Angles at, bool interleaved) {
  const T* type = nullptr;
  if (interleaved) {
    Vec sign;  // (-1, 1, -1, 1, ...): the partner of an even element enters with a minus
    float pattern[kLanes];
    for (int i = 0; i < kLanes; ++i) pattern[i] = i % 2 ? 1.f : -1.f;
    sign = load(static_cast<const float*>(pattern));
    for (int x = 0; x < dim; x += kLanes) {
      const int n = smaller(kLanes, dim - x);
      const Vec a = load_n(src + x, n);
      const Vec y = fma(swap_pairs(a) * sign, load_n(at.sin + x, n), a * load_n(at.cos + x, n));
      store_n(dst + x, round_as(type, y), n);
    }
    return;
  }
  const int half = dim / 2;
  for (int x = 0; x < half; x += kLanes) {
    const int n = smaller(kLanes, half - x);
    const Vec a = load_n(src + x, n), b = load_n(src + half + x, n);
    const Vec first = fnma(b, load_n(at.sin + x, n), a * load_n(at.cos + x, n));
    const Vec second = fma(a, load_n(at.sin + half + x, n), b * load_n(at.cos + half + x, n));
    store_n(dst + x, round_as(type, first), n);
    store_n(dst + half + x, round_as(type, second), n);
  }
}

// One row as cells: converted, rotated, an odd bf16 row padded with a zero.
template <class Cells, class T>
static void copy_row(const T* src, Cell* cells, int dim, Angles at, bool interleaved) {
  typedef typename Cells::Element U;
  U* dst = reinterpret_cast<U*>(cells);
  if (at.cos != nullptr) {
    rotate_row(src, dst, dim, at, interleaved);
  } else if constexpr (__is_same(T, U)) {
    __builtin_memcpy(dst, src, sizeof(T) * static_cast<unsigned>(dim));
  } else {
    int x = 0;
    for (; x + kLanes <= dim; x += kLanes) store(dst + x, load(src + x));
    if (x < dim) store_n(dst + x, load_n(src + x, dim - x), dim - x);
  }
  if (Cells::kDepth == 2 && dim % 2) __builtin_memset(static_cast<void*>(dst + dim), 0, sizeof(U));
}

// Whether rows of T can be read as cells where they are.
template <class Cells, class T>
constexpr bool reads_in_place(int dim) {
  return __is_same(T, typename Cells::Element) && dim % Cells::kDepth == 0;
}

template <class Cells>
VLMOPS_INLINE int row_cells(int dim) {
  return (dim + Cells::kDepth - 1) / Cells::kDepth;
}

// Packed K is [len_k][row_cells], packed V behind it [ceil(len_k / kDepth)][dim].
template <class Cells>
VLMOPS_INLINE i64 packed_keys_bytes(int dim, i64 len_k) {
  return round_up(len_k * row_cells<Cells>(dim) * 4, 64);
}
template <class Cells>
VLMOPS_INLINE i64 packed_bytes(int dim, i64 len_k) {
  return packed_keys_bytes<Cells>(dim, len_k) + round_up(row_cells<Cells>(static_cast<int>(len_k)) * i64(4) * dim, 64);
}

constexpr int kFetchRows = 16;  // distance of the prefetch while packing

template <class T>
VLMOPS_INLINE void fetch_row(const T* at, int dim) {
  Ahead::fetch(reinterpret_cast<const char*>(at), dim * static_cast<int>(sizeof(T)), false);
}

template <class Cells, class T>
static void pack_keys(const VarlenAttention& a, const VarlenTask& t, Cell* dst) {
  const T* src = static_cast<const T*>(a.k) + t.start_k * a.k_token + t.head_kv * a.k_head;
  for (i64 j = 0; j < t.len_k; ++j, src += a.k_token, dst += row_cells<Cells>(a.head_dim)) {
    if (j + kFetchRows < t.len_k) fetch_row(src + kFetchRows * a.k_token, a.head_dim);
    Angles at = {nullptr, nullptr};
    if (a.cos_k != nullptr) at = {a.cos_k + (t.start_k + j) * a.head_dim, a.sin_k + (t.start_k + j) * a.head_dim};
    copy_row<Cells>(src, dst, a.head_dim, at, a.interleaved);
  }
}

template <class Cells, class T>
static void pack_values(const VarlenAttention& a, const VarlenTask& t, Cell* dst) {
  const T* src = static_cast<const T*>(a.v) + t.start_k * a.v_token + t.head_kv * a.v_head;
  if constexpr (Cells::kDepth == 1) {
    for (i64 j = 0; j < t.len_k; ++j, src += a.v_token, dst += a.head_dim) {
      if (j + kFetchRows < t.len_k) fetch_row(src + kFetchRows * a.v_token, a.head_dim);
      copy_row<Cells>(src, dst, a.head_dim, {nullptr, nullptr}, false);
    }
  } else {
    const T* zeros = reinterpret_cast<const T*>(kZeros);  // partner of an odd last key
    for (i64 j = 0; j < t.len_k; j += 2, src += 2 * a.v_token, dst += a.head_dim) {
      const T* odd = j + 1 < t.len_k ? src + a.v_token : zeros;
      if (j + kFetchRows + 1 < t.len_k) {
        fetch_row(src + kFetchRows * a.v_token, a.head_dim);
        fetch_row(src + (kFetchRows + 1) * a.v_token, a.head_dim);
      }
      for (int x = 0; x < a.head_dim; x += kLanes) {
        const int n = smaller(kLanes, a.head_dim - x);
        store_n((float*)(dst + x), Cells::zip(src + x, odd + x, n), n);
      }
    }
  }
}

// dst[cell][lane] = rows[lane][cell]: NR * kLanes rows of cells, transposed.
template <int NR>
static void transpose_rows(const Cell* const* rows, int cells, Cell* dst) {
  for (int x = 0; x < cells; x += kLanes) {
    const int m = smaller(kLanes, cells - x);
    for (int g = 0; g < NR; ++g) {
      Vec r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) r[i] = load_n((const float*)(rows[g * kLanes + i] + x), m);
      transpose(r);
      Cell* to = dst + i64(x) * NR * kLanes + g * kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        if (i < m) store((float*)(to + i * NR * kLanes), r[i]);
    }
  }
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
