// Rotary position embedding of the heads of q and k in one pass: read, turn in float, round, write.
//
// A block takes some tokens and some of their heads. Lanes walk along a token's heads, so that every access is whole
// sectors whatever the head size: rotate-half's partner, half a head away, comes through shared memory. The tables
// are read once per block.
//
// VLMOPS_T, VLMOPS_C: types of the heads and of the tables. VLMOPS_D, VLMOPS_R: elements of a head, and how many of
// them turn. VLMOPS_VEC, VLMOPS_CVEC: elements of an access to heads and tables. VLMOPS_INTERLEAVED: pairs are (2i, 2i
// + 1).
#include "ptx/memory.cuh"
#include "ptx/platform.cuh"
#include "ptx/types.cuh"

namespace vlmops {

using T = VLMOPS_T;
using C = VLMOPS_C;

constexpr int kDim = VLMOPS_D, kTurned = VLMOPS_R, kHalf = kTurned / 2, kVec = VLMOPS_VEC, kTableVec = VLMOPS_CVEC;
constexpr bool kInterleaved = VLMOPS_INTERLEAVED != 0;
constexpr bool kStaged = !kInterleaved || kVec == 1;  // the partner is in another thread's vector
constexpr int kVectors = kDim / kVec;                 // of a head

VLMOPS_DEVICE constexpr int gcd(int a, int b) {
  while (b != 0) {
    const int rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}
constexpr int kPiece = gcd(kInterleaved ? kTurned : kHalf, kVec);  // elements that have one run of partners

static_assert(kDim % kVec == 0 && kTurned % kTableVec == 0 && kTurned % 2 == 0 && kTurned <= kDim, "");

// Bytes from global to shared memory, in the background where they are enough for that.
template <int N, class E>
VLMOPS_DEVICE void stage(E* shared, const E* global) {
  if constexpr (sizeof(E) * N >= 4) {
    cp_async<sizeof(E) * N>(shared, global, true);
  } else {
    store_vec<N>(shared, load_vec<N>(global));
  }
}

// N neighbouring elements as floats.
template <int N, class E>
VLMOPS_DEVICE void read(float* to, const E* from) {
  constexpr int kStep = sizeof(E) * N > 16 ? 16 / sizeof(E) : N;
  VLMOPS_UNROLL
  for (int i = 0; i < N; i += kStep) {
    const auto part = load_vec<kStep>(from + i);
    VLMOPS_UNROLL
    for (int j = 0; j < kStep; ++j) to[i + j] = to_float(part[j]);
  }
}

// Where element `at` of the tables lies in shared memory. Of 16-byte units, every other eight are swapped in pairs:
// lanes that read units 0, 2, 4, ... then meet all banks.
VLMOPS_DEVICE int placed(int at) {
  constexpr int kUnit = 16 / sizeof(C);
  if constexpr (kTableVec != kUnit) return at;
  return at ^ (at / (8 * kUnit) % 2 * kUnit);
}

// N neighbouring elements of the tables as floats.
template <int N>
VLMOPS_DEVICE void read_table(float* to, const C* tables, int at) {
  constexpr int kStep = sizeof(C) * N > 16 ? 16 / sizeof(C) : N;
  VLMOPS_UNROLL
  for (int i = 0; i < N; i += kStep) read<kStep>(to + i, tables + placed(at + i));
}

// x [tokens, heads, D] and k [tokens, heads_k, D] with any token and head strides, turned by cos and sin [tokens, R],
// into dense out and out_k. The grid is (blocks of `per_block` tokens, chunks of `chunk` heads of x and k together);
// `group` threads, a multiple of D / VEC, share a token. `inverse`: the transposed rotation.
VLMOPS_KERNEL(rotary_heads)
(const T* x, const T* k, const C* cos, const C* sin, T* out, T* out_k, int64_t x_stride_t, int64_t x_stride_h,
 int64_t k_stride_t, int64_t k_stride_h, int64_t cos_stride, int64_t sin_stride, int tokens, int heads, int heads_k,
 int per_block, int group, int chunk, int inverse) {
  VLMOPS_DYNAMIC_SHARED(char, dynamic);
  C* const tables = reinterpret_cast<C*>(dynamic);  // cos [per_block, R], sin [per_block, R]
  const int sines_begin = per_block * kTurned;
  const int table_bytes = 2 * sines_begin * static_cast<int>(sizeof(C));
  T* const staged = reinterpret_cast<T*>(dynamic + (table_bytes + 31) / 32 * 32);  // [per_block, chunk, D]

  const int thread = static_cast<int>(threadIdx.x);
  const int slot = thread / group, in_group = thread % group;
  const int at = in_group % kVectors * kVec;  // this thread's elements of each head
  const int first_head = in_group / kVectors, head_step = group / kVectors;
  const int chunk_begin = static_cast<int>(blockIdx.y) * chunk;
  const int chunk_heads = min_of(chunk, heads + heads_k - chunk_begin);
  const int64_t token_begin = static_cast<int64_t>(blockIdx.x) * per_block;
  const int64_t token = token_begin + slot;
  const bool here = slot < per_block && token < tokens;

  const auto source = [&](int head) {
    head += chunk_begin;
    return (head < heads ? x + token * x_stride_t + head * x_stride_h
                         : k + token * k_stride_t + (head - heads) * k_stride_h) +
           at;
  };

  constexpr int kTableVectors = kTurned / kTableVec;
  for (int i = thread; i < per_block * kTableVectors; i += VLMOPS_THREADS) {
    const int row = i / kTableVectors, column = i % kTableVectors * kTableVec;
    if (token_begin + row < tokens) {
      const int to = row * kTurned + column;
      stage<kTableVec>(tables + placed(to), cos + (token_begin + row) * cos_stride + column);
      stage<kTableVec>(tables + placed(sines_begin + to), sin + (token_begin + row) * sin_stride + column);
    }
  }
  if (kStaged && here) {
    VLMOPS_UNROLL_N(4)
    for (int head = first_head; head < chunk_heads; head += head_step) {
      stage<kVec>(staged + (slot * chunk + head) * kDim + at, source(head));
    }
  }
  cp_async_commit();
  cp_async_wait_group<0>();
  __syncthreads();
  if (!here) return;

  // out[d] = x[d] * turn[d] + x[partner(d)] * push[d], the sign of the rotation in push
  float turn[kVec], push[kVec];
  int partner[kVec / kPiece];
  VLMOPS_UNROLL
  for (int piece = 0; piece < kVec; piece += kPiece) {
    const int d = at + piece;
    int other = 0;
    if (d < kTurned) {
      if constexpr (kInterleaved) {
        other = kVec == 1 ? d ^ 1 : d;
      } else {
        other = d < kHalf ? d + kHalf : d - kHalf;
      }
      read_table<kPiece>(turn + piece, tables, slot * kTurned + d);
      float sines[kPiece];
      read_table<kPiece>(sines, tables, sines_begin + slot * kTurned + (inverse ? other : d));
      VLMOPS_UNROLL
      for (int i = 0; i < kPiece; ++i) {
        // interleaved inside a vector: the inverse takes the neighbour's sine
        const float s = kInterleaved && kVec > 1 && inverse ? sines[(i ^ 1) % kPiece] : sines[i];
        const bool first = kInterleaved ? (d + i) % 2 == 0 : d < kHalf;
        push[piece + i] = first != (inverse != 0) ? -s : s;
      }
    }
    partner[piece / kPiece] = other;
  }

  VLMOPS_UNROLL_N(2)
  for (int head = first_head; head < chunk_heads; head += head_step) {
    const T* const row = staged + (slot * chunk + head) * kDim;
    Vec<T, kVec> own = kStaged ? load_vec<kVec>(row + at) : load_vec<kVec>(source(head));
    float value[kVec], other[kVec];
    VLMOPS_UNROLL
    for (int i = 0; i < kVec; ++i) value[i] = to_float(own[i]);
    VLMOPS_UNROLL
    for (int piece = 0; piece < kVec; piece += kPiece) {
      if (at + piece >= kTurned) continue;  // the rest of a head stays as it is
      if constexpr (kStaged) {
        read<kPiece>(other + piece, row + partner[piece / kPiece]);
      } else {
        VLMOPS_UNROLL
        for (int i = 0; i < kPiece; ++i) other[piece + i] = value[piece + (i ^ 1) % kPiece];
      }
      VLMOPS_UNROLL
      for (int i = piece; i < piece + kPiece; ++i) own[i] = from_float<T>(value[i] * turn[i] + other[i] * push[i]);
    }
    const int absolute = chunk_begin + head;
    T* const to = absolute < heads ? out + (token * heads + absolute) * kDim
                                   : out_k + (token * heads_k + (absolute - heads)) * kDim;
    store_vec<kVec>(to + at, own);
  }
}

}  // namespace vlmops
