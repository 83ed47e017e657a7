// What happens to a product in registers before it is written: residual + mask * tanh(gate) * act(. + bias).
#pragma once

#include "../ptx/memory.cuh"
#include "activations.cuh"

namespace vlmops {

// The parts; an absent one is null.
template <class T>
struct Epilogue {
  const T* bias;        // [N]
  const T* gate;        // [1], gate_step 0; or [N], gate_step 1
  const uint8_t* mask;  // [M], 0: the row's product counts as 0
  const T* residual;    // [M, N], rows residual_stride apart
  T* out;               // [M, N], dense
  int64_t residual_stride;
  int gate_step;
};

// N neighbouring elements as floats, Each an access; zeros from `count` on, which is a multiple of Each.
template <int Each, int N, class T>
VLMOPS_DEVICE void read_columns(float (&to)[N], const T* from, int count) {
  VLMOPS_UNROLL
  for (int i = 0; i < N; i += Each) {
    VLMOPS_UNROLL
    for (int j = 0; j < Each; ++j) to[i + j] = 0.f;
    if (i < count) {
      const auto part = load_vec_readonly<Each>(from + i);
      VLMOPS_UNROLL
      for (int j = 0; j < Each; ++j) to[i + j] = to_float(part[j]);
    }
  }
}

// The same of a vector that may be absent: then zeros.
template <int Each, int N, class T>
VLMOPS_DEVICE void read_terms(float (&to)[N], const T* vector, int column, int count) {
  if (vector != nullptr) {
    read_columns<Each>(to, vector + column, count);
  } else {
    VLMOPS_UNROLL
    for (int i = 0; i < N; ++i) to[i] = 0.f;
  }
}

// The other way.
template <int Each, int N, class T>
VLMOPS_DEVICE void write_columns(T* to, const float (&v)[N], int count) {
  VLMOPS_UNROLL
  for (int i = 0; i < N; i += Each) {
    if (i < count) {
      Vec<T, Each> part;
      VLMOPS_UNROLL
      for (int j = 0; j < Each; ++j) part[j] = from_float<T>(v[i + j]);
      store_vec<Each>(to + i, part);
    }
  }
}

// The bias and the gate of N neighbouring columns, the same for all rows.
template <int N>
struct ColumnTerms {
  float bias[N], factor[N];
};

// Scale: the gate is a factor as it is (LayerScale), without tanh.
template <int Each, int N, bool Scale = false, class T>
VLMOPS_DEVICE ColumnTerms<N> column_terms(const Epilogue<T>& e, int column, int count) {
  ColumnTerms<N> terms;
  VLMOPS_UNROLL
  for (int i = 0; i < N; ++i) terms.factor[i] = 1.f;
  read_terms<Each>(terms.bias, e.bias, column, count);
  if (e.gate != nullptr) {
    if (e.gate_step != 0) {
      read_columns<Each>(terms.factor, e.gate + column, count);
      VLMOPS_UNROLL
      for (int i = 0; i < N; ++i) terms.factor[i] = Scale ? terms.factor[i] : tanh_exact(terms.factor[i]);
    } else {
      const float gate = to_float(*e.gate), factor = Scale ? gate : tanh_exact(gate);
      VLMOPS_UNROLL
      for (int i = 0; i < N; ++i) terms.factor[i] = factor;
    }
  }
  return terms;
}

// Finishes and writes N neighbouring columns of a row, Each an access, as far as they are inside the matrix.
template <Activation A, int Each, int N, class T>
VLMOPS_DEVICE void finish_row(const Epilogue<T>& e, const ColumnTerms<N>& terms, float (&v)[N], int64_t row, int column,
                              int columns) {
  const int count = columns - column;
  const bool keep = e.mask == nullptr || e.mask[row] != 0;
  VLMOPS_UNROLL
  for (int i = 0; i < N; ++i) v[i] = keep ? activate<A>(v[i] + terms.bias[i]) * terms.factor[i] : 0.f;
  if (e.residual != nullptr) {
    float r[N];
    read_columns<Each>(r, e.residual + row * e.residual_stride + column, count);
    VLMOPS_UNROLL
    for (int i = 0; i < N; ++i) v[i] += r[i];
  }
  write_columns<Each>(e.out + row * columns + column, v, count);
}

}  // namespace vlmops
