// RMSNorm and LayerNorm of rows [rows, width]: a row lives in the registers of one warp or one block, so each element
// is read once and the variance is that of centred values.
//
// VLMOPS_T: type of the rows; VLMOPS_W: of weight and bias; VLMOPS_O: of the result (its gradient in the backward).
// VLMOPS_VEC: elements of an access; VLMOPS_ITEMS: accesses of a thread to a row; VLMOPS_LANES: threads of a row, 32
// (then a block has several rows) or the whole block.
#include "ptx/math.cuh"
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"
#include "ptx/warp.cuh"

namespace vlmops {

#ifndef VLMOPS_ENTRY_norms_column_sum

using T = VLMOPS_T;
using W = VLMOPS_W;
using O = VLMOPS_O;

constexpr int kVec = VLMOPS_VEC, kItems = VLMOPS_ITEMS, kLanes = VLMOPS_LANES;
constexpr int kRows = VLMOPS_THREADS / kLanes;  // of a block at a time
constexpr int kWarps = kLanes / kWarp;          // of a row

static_assert(kLanes == kWarp || kLanes == VLMOPS_THREADS, "a row is a warp's or a block's");

// One thread's part of a row: kItems vectors, kLanes vectors apart; 0 outside the row.
struct Part {
  float at[kItems][kVec];
};

VLMOPS_DEVICE int column(int item) { return (item * kLanes + static_cast<int>(threadIdx.x) % kLanes) * kVec; }

// N elements as floats, in accesses of at most 16 bytes.
template <class E>
VLMOPS_DEVICE void read(float (&to)[kVec], const E* from) {
  constexpr int kStep = sizeof(E) * kVec > 16 ? 16 / sizeof(E) : kVec;
  VLMOPS_UNROLL
  for (int i = 0; i < kVec; i += kStep) {
    const auto part = load_vec_readonly<kStep>(from + i);
    VLMOPS_UNROLL
    for (int j = 0; j < kStep; ++j) to[i + j] = to_float(part[j]);
  }
}
template <class E>
VLMOPS_DEVICE void write(E* to, const float (&from)[kVec]) {
  constexpr int kStep = sizeof(E) * kVec > 16 ? 16 / sizeof(E) : kVec;
  VLMOPS_UNROLL
  for (int i = 0; i < kVec; i += kStep) {
    Vec<E, kStep> part;
    VLMOPS_UNROLL
    for (int j = 0; j < kStep; ++j) part[j] = from_float<E>(from[i + j]);
    store_vec<kStep>(to + i, part);
  }
}

template <class E>
VLMOPS_DEVICE Part read_row(const E* row, int width) {
  Part part;
  VLMOPS_UNROLL
  for (int item = 0; item < kItems; ++item) {
    VLMOPS_UNROLL
    for (int i = 0; i < kVec; ++i) part.at[item][i] = 0.f;
    if (column(item) < width) read(part.at[item], row + column(item));
  }
  return part;
}
template <class E>
VLMOPS_DEVICE void write_row(E* row, int width, const Part& part) {
  VLMOPS_UNROLL
  for (int item = 0; item < kItems; ++item) {
    if (column(item) < width) write(row + column(item), part.at[item]);
  }
}

// f(value, element of the row) for every element this thread has of it.
template <class F>
VLMOPS_DEVICE void each(Part& part, int width, F f) {
  VLMOPS_UNROLL
  for (int item = 0; item < kItems; ++item) {
    if (column(item) < width) {
      VLMOPS_UNROLL
      for (int i = 0; i < kVec; ++i) f(part.at[item][i], item, i);
    }
  }
}

// Sum over the row's threads, the same in each. `scratch`: kWarps floats, not those of the sum before.
VLMOPS_DEVICE float row_sum(float value, float* scratch) {
  value = warp_sum(value);
  if constexpr (kWarps > 1) {
    if (lane_id() == 0) scratch[warp_id()] = value;
    __syncthreads();
    value = warp_sum(lane_id() < kWarps ? scratch[lane_id()] : 0.f);
  }
  return value;
}

VLMOPS_DEVICE float sum_of(Part& part, int width) {
  float sum = 0.f;
  each(part, width, [&](float& v, int, int) { sum += v; });
  return sum;
}

// Centres the row where asked for, and returns 1 / sqrt(mean square + eps).
VLMOPS_DEVICE float normalise(Part& part, int width, float eps, int center, float* scratch_mean,
                              float* scratch_square) {
  if (center) {
    const float mean = row_sum(sum_of(part, width), scratch_mean) / static_cast<float>(width);
    each(part, width, [&](float& v, int, int) { v -= mean; });
  }
  float squares = 0.f;
  each(part, width, [&](float& v, int, int) { squares = fma(v, v, squares); });
  return rsqrt_exact(row_sum(squares, scratch_square) / static_cast<float>(width) + eps);
}

#endif

#ifdef VLMOPS_ENTRY_norms_forward
// out [rows, width] = norm of x (+ residual), total = x + residual rounded to T. Absent residual, weight, bias: null.
// `round_first`: the row is rounded to T before it meets the weight (Llama's RMSNorm), else after.
VLMOPS_KERNEL(norms_forward)
(const T* x, const T* residual, const W* weight, const W* bias, O* out, T* total, int64_t x_stride, int64_t r_stride,
 int rows, int width, float eps, float offset, int center, int round_first) {
  __shared__ float scratch[2][kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kLanes;
  if (row >= rows) return;  // a whole warp, or nobody
  Part h = read_row(x + row * x_stride, width);
  if (residual != nullptr) {
    const Part r = read_row(residual + row * r_stride, width);
    each(h, width, [&](float& v, int item, int i) { v = to_float(from_float<T>(v + r.at[item][i])); });
    write_row(total + row * width, width, h);
  }
  const float rstd = normalise(h, width, eps, center, scratch[0], scratch[1]);
  each(h, width, [&](float& v, int, int) { v *= rstd; });
  if (weight != nullptr) {
    const Part w = read_row(weight, width);
    each(h, width, [&](float& v, int item, int i) {
      if (round_first) v = to_float(from_float<T>(v));
      v *= w.at[item][i] + offset;
    });
  }
  if (bias != nullptr) {
    const Part b = read_row(bias, width);
    each(h, width, [&](float& v, int item, int i) { v += b.at[item][i]; });
  }
  write_row(out + row * width, width, h);
}
#endif

#ifdef VLMOPS_ENTRY_norms_backward
// A block's part of a weight's gradient, [width]: the sum over its warps' rows, always in the same order.
VLMOPS_DEVICE void write_partial(Part& part, float* to, int width) {
  if constexpr (kRows == 1) {
    write_row(to, width, part);
  } else {
    constexpr int kSlab = kLanes * kItems * kVec;
    __shared__ __align__(16) float slabs[kRows][kSlab];
    const int group = static_cast<int>(threadIdx.x) / kLanes;
    VLMOPS_UNROLL
    for (int item = 0; item < kItems; ++item) write(slabs[group] + column(item), part.at[item]);
    __syncthreads();
    for (int c = static_cast<int>(threadIdx.x); c < width; c += VLMOPS_THREADS) {
      float sum = slabs[0][c];
      VLMOPS_UNROLL
      for (int g = 1; g < kRows; ++g) sum += slabs[g][c];
      to[c] = sum;
    }
    __syncthreads();  // the slabs serve the next gradient
  }
}

// dx [rows, width] and each block's part of the gradients of weight and bias, dw and db [blocks, width]; null where not
// wanted. With xhat = (h - mean) r and g = grad w: dx = r (g - mean(g) - xhat mean(g xhat)) + grad_total, the first
// mean only where rows are centred. Resident: up to 128 registers a thread, which the five parts of a row need.
VLMOPS_KERNEL_RESIDENT(norms_backward, (VLMOPS_THREADS < 512 ? 512 / VLMOPS_THREADS : 1))
(const O* grad, const T* grad_total, const T* h, const W* weight, T* dx, float* dw, float* db, int64_t g_stride,
 int64_t t_stride, int64_t h_stride, int rows, int width, float eps, float offset, int center) {
  __shared__ float scratch[4][kWarp];
  Part dw_part, db_part;
  VLMOPS_UNROLL
  for (int item = 0; item < kItems; ++item) {
    VLMOPS_UNROLL
    for (int i = 0; i < kVec; ++i) dw_part.at[item][i] = db_part.at[item][i] = 0.f;
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + static_cast<int>(threadIdx.x) / kLanes; row < rows;
       row += step) {
    Part xhat = read_row(h + row * h_stride, width);
    Part g = read_row(grad + row * g_stride, width);
    const float rstd = normalise(xhat, width, eps, center, scratch[0], scratch[1]);
    each(xhat, width, [&](float& v, int item, int i) {
      v *= rstd;
      dw_part.at[item][i] = fma(g.at[item][i], v, dw_part.at[item][i]);
      if (VLMOPS_BIAS) db_part.at[item][i] += g.at[item][i];
    });
    if (dx == nullptr) {
      if constexpr (kWarps > 1) __syncthreads();  // the next row's sum takes the same scratch
      continue;
    }
    if (weight != nullptr) {
      const Part w = read_row(weight, width);
      each(g, width, [&](float& v, int item, int i) { v *= w.at[item][i] + offset; });
    }
    float along = 0.f;
    each(g, width, [&](float& v, int item, int i) { along = fma(v, xhat.at[item][i], along); });
    along = row_sum(along, scratch[2]) / static_cast<float>(width);
    float mean = 0.f;
    if (center) mean = row_sum(sum_of(g, width), scratch[3]) / static_cast<float>(width);
    each(g, width, [&](float& v, int item, int i) { v = (v - xhat.at[item][i] * along - mean) * rstd; });
    if (grad_total != nullptr) {
      const Part t = read_row(grad_total + row * t_stride, width);
      each(g, width, [&](float& v, int item, int i) { v += t.at[item][i]; });
    }
    write_row(dx + row * width, width, g);
  }
  const int64_t block = blockIdx.x;
  if (dw != nullptr) write_partial(dw_part, dw + block * width, width);
  if (VLMOPS_BIAS && db != nullptr) write_partial(db_part, db + block * width, width);
}
#endif

#ifdef VLMOPS_ENTRY_norms_column_sum
// out [width] = x [rows, width] summed over the rows, always in the same order: 32 columns a block, rows over its
// warps.
VLMOPS_KERNEL(norms_column_sum)(const float* x, VLMOPS_T* out, int rows, int width) {
  constexpr int kWarps = VLMOPS_THREADS / kWarp;
  __shared__ float parts[kWarps][kWarp];
  const int column = static_cast<int>(blockIdx.x) * kWarp + lane_id();
  float sum = 0.f;
  if (column < width) {
    VLMOPS_UNROLL_N(4)
    for (int row = warp_id(); row < rows; row += kWarps) sum += x[static_cast<int64_t>(row) * width + column];
  }
  parts[warp_id()][lane_id()] = sum;
  __syncthreads();
  if (warp_id() != 0 || column >= width) return;
  VLMOPS_UNROLL
  for (int w = 1; w < kWarps; ++w) sum += parts[w][lane_id()];
  out[column] = from_float<VLMOPS_T>(sum);
}
#endif

}  // namespace vlmops
