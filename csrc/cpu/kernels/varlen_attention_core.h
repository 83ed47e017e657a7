// The attention of one strip of queries: NR vectors of lanes, one query a lane, against all keys of its sequence.
//
// Scores come out of the tile transposed, S^T[key][query]. The softmax of one tile runs while the next one is
// multiplied, on the pipes that do not multiply, so it costs almost nothing; but it then needs a row maximum before all
// scores are known. Any reference within 2^24 of it does as well, because floats (and bf16 probabilities) keep their
// relative precision at any magnitude. So the maximum over the first few keys stands in, the row sum tells at the end
// of a block whether it was good enough, and a block where it was not is done again with the true maximum.
#pragma once

#include "varlen_attention_pack.h"

namespace vlmops {
namespace VLMOPS_ISA {

constexpr int kMaxStrip = kMaxNR * kLanes;  // queries in the widest strip
constexpr float kMinSum = 0x1p-20f, kMaxSum = 0x1p24f;
constexpr float kLog2E = 1.44269504088896f, kLn2 = 0.69314718055994f;

#if VLMOPS_ISA_ID == VLMOPS_ISA_ID_generic || VLMOPS_ISA_ID == VLMOPS_ISA_ID_avx2
constexpr bool kInterleave = false;
constexpr int score_rows(int nr) { return tile_rows(nr); }
#else  // registers are left for the softmax
constexpr bool kInterleave = true;
constexpr int score_rows(int nr) { return nr == 4 ? 4 : nr == 3 ? 6 : nr == 2 ? 8 : 12; }
#endif

template <class Cells>
constexpr int kBlockKeys = Cells::kDepth == 2 ? 144 : 96;  // P of a block stays in the first-level cache

// 2^t for t in [-125, 126]; what lies outside is moved to the border. NaN stays NaN.
template <class Cells>
VLMOPS_INLINE Vec exp2_clamped(Vec t) {
  t = min(set1(126.f), max(set1(-125.f), t));
  const Vec u = t + set1(12582912.f);  // the nearest whole number, in the low mantissa bits
  const Vec f = t - (u - set1(12582912.f));
  if constexpr (Cells::kDepth == 2) {  // 3e-6 is far below a bf16 rounding
    Vec p = fma(set1(9.582776576e-3f), f, set1(5.590721220e-2f));
    p = fma(p, f, set1(2.402410507e-1f));
    p = fma(p, f, set1(6.931241155e-1f));
    p = fma(p, f, set1(1.f));
    return add_exponent(p, u);
  } else {
    Vec p = fma(set1(1.326459111e-3f), f, set1(9.671619162e-3f));
    p = fma(p, f, set1(5.550735071e-2f));
    p = fma(p, f, set1(2.402224094e-1f));
    p = fma(p, f, set1(6.931470037e-1f));
    p = fma(p, f, set1(1.f));
    return p * add_exponent(set1(1.f), u);
  }
}

// What a strip works with. W is NR * kLanes; its arrays are 64-byte aligned.
struct Strip {
  const Cell* k;  // cell c of key j at k + j * k_stride + c
  i64 k_stride;
  const Cell* v;  // element d of keys kDepth * j ... at v + j * v_stride + d
  i64 v_stride;
  int dim, cells;
  float scale, softcap;
  float scale_log2;  // scale * log2(e)
  i64 prefix;        // keys before it are seen by every query
  Ahead* ahead;
  Cell* q;         // [cells][W]
  Cell* p;         // [block keys / kDepth][W]
  float* s;        // [block keys][W]
  float* o;        // [dim][W]
  float* minus_m;  // [W] minus the reference m of each row, in log2 units
  float* l;        // [W] sum of 2^(score - m)
  float* sum;      // [W] what the block under way would make of l
  float* lo;       // [W] keys seen outside the prefix: lo <= key < hi
  float* hi;       // [W]
};

// Scores that wait for their softmax, by steps: step i is pair i / NR of keys, vector i % NR of queries.
struct Pending {
  const float* s;
  Cell* p;
  int next, count;
  bool odd;  // the last pair has no second key
};

// 2^(score - m) of one vector of queries at two neighbouring keys, added to the row sums and stored as probabilities.
template <class Cells, int NR>
VLMOPS_INLINE void softmax_step(const Strip& t, Pending& w) {
  constexpr int W = NR * kLanes;
  const int j = w.next % NR, pair = w.next / NR;
  const float* s = w.s + (2 * pair) * W + j * kLanes;
  const Vec scale = set1(t.scale_log2), minus_m = load(t.minus_m + j * kLanes);
  const Vec even = exp2_clamped<Cells>(fma(load(s), scale, minus_m));
  Vec odd = exp2_clamped<Cells>(fma(load(s + W), scale, minus_m));
  if (w.odd && w.next + NR >= w.count) odd = zero();
  float* sum = t.sum + j * kLanes;
  store(sum, load((const float*)sum) + (even + odd));
  if constexpr (Cells::kDepth == 2) {
    store((float*)(w.p + pair * W + j * kLanes), Cells::join(even, odd));
  } else {
    store((float*)(w.p + 2 * pair * W + j * kLanes), even);
    store((float*)(w.p + (2 * pair + 1) * W + j * kLanes), odd);
  }
  ++w.next;
}

// Unscaled scores of MR keys. While they are summed, the softmax of the keys before them runs on the pipes that do not
// multiply: one step every few cells.
template <class Cells, int NR, int MR>
static void score_tile(const Strip& t, i64 key, bool odd, float* s, Pending& w) {
  constexpr int kEvery = 4;
  Vec c[MR][NR];
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) c[i][j] = zero();
  const i64 stride = odd ? 0 : t.k_stride;  // the second key of an incomplete pair: any that can be read
  const Cell* k = t.k + key * t.k_stride;
  const Cell* q = t.q;
  int x = 0;
  for (; x + kEvery <= t.cells; x += kEvery) {
    multiply<Cells, Walk::kRows, MR, NR>(c, k, stride, q, kEvery);
    k += kEvery;
    q += kEvery * NR * kLanes;
    if (kInterleave && w.next < w.count) softmax_step<Cells, NR>(t, w);
  }
  multiply<Cells, Walk::kRows, MR, NR>(c, k, stride, q, t.cells - x);
  while (w.next < w.count) softmax_step<Cells, NR>(t, w);
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) store(s + (i * NR + j) * kLanes, c[i][j]);
}

// fn.run<MR>(offset, rows) over `count` rows in tiles as tall as possible; kPairs: never a tile of one row.
template <int kRows, bool kPairs, class Fn>
VLMOPS_INLINE void for_tiles(i64 count, Fn& fn) {
  i64 x = 0;
  while (count - x >= kRows && count - x != 8) {
    fn.template run<kRows>(x, kRows);
    x += kRows;
  }
  for (; count - x >= 4; x += 4) fn.template run<4>(x, 4);
  for (; count - x >= 2; x += 2) fn.template run<2>(x, 2);
  if (x < count) fn.template run<kPairs ? 2 : 1>(x, 1);
}

template <class Cells, int NR>
struct ScoreTiles {
  const Strip& t;
  i64 begin;
  bool first;
  Pending waiting;
  int turn;

  template <int MR>
  void run(i64 x, int rows) {
    constexpr int W = NR * kLanes;
    float* s = t.s + turn * 12 * W;  // two buffers in turn
    turn ^= 1;
    const bool odd = MR == 2 && rows == 1;
    t.ahead->step();
    score_tile<Cells, NR, MR>(t, begin + x, odd, s, waiting);
    if (first && x == 0) start<MR>(s);
    waiting = {s, t.p + x / Cells::kDepth * W, 0, (MR + 1) / 2 * NR, odd};
  }

  // The reference of each row: the maximum over the first keys.
  template <int MR>
  void start(const float* s) {
    const Vec scale = set1(t.scale_log2);
    for (int j = 0; j < NR; ++j) {
      Vec top = load(s + j * kLanes) * scale;
      for (int i = 1; i < MR; ++i) top = max(top, load(s + (i * NR + j) * kLanes) * scale);
      store(t.minus_m + j * kLanes, -top);
    }
  }

  void finish() {
    while (waiting.next < waiting.count) softmax_step<Cells, NR>(t, waiting);
  }
};

template <class Cells, int NR>
struct RawTiles {
  const Strip& t;
  i64 begin;
  template <int MR>
  void run(i64 x, int rows) {
    Pending nothing = {nullptr, nullptr, 0, 0, false};
    score_tile<Cells, NR, MR>(t, begin + x, MR == 2 && rows == 1, t.s + x * NR * kLanes, nothing);
  }
};

// O^T[d][query] += sum over the block's keys of V[key][d] * P[key][query].
template <class Cells, int NR>
struct ValueTiles {
  const Strip& t;
  const Cell* v;
  int depth;
  bool first;
  template <int MR>
  void run(i64 d, int) {
    t.ahead->step();
    tile<MR>(t.o + d * NR * kLanes, v + d);
  }
  template <int MR>
  __attribute__((noinline)) void tile(float* o, const Cell* a) {
    Vec c[MR][NR];
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) c[i][j] = first ? zero() : load(o + (i * NR + j) * kLanes);
    multiply<Cells, Walk::kColumns, MR, NR>(c, a, t.v_stride, t.p, depth);
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) store(o + (i * NR + j) * kLanes, c[i][j]);
  }
};

// Scores of one block with the reference at hand. False if it was off, then only t.p, t.s, t.sum (and t.minus_m if
// first) changed.
template <class Cells, int NR>
static bool fast_block(const Strip& t, i64 begin, i64 end, bool first) {
  for (int j = 0; j < NR; ++j) store(t.sum + j * kLanes, first ? zero() : load(t.l + j * kLanes));
  ScoreTiles<Cells, NR> tiles{t, begin, first, {nullptr, nullptr, 0, 0, false}, 0};
  for_tiles<score_rows(NR), true>(end - begin, tiles);
  tiles.finish();
  bool good = true;
  for (int j = 0; j < NR; ++j) {
    const Vec sum = load(t.sum + j * kLanes);
    good = good && all(and_(le(set1(kMinSum), sum), le(sum, set1(kMaxSum))));
  }
  if (good)
    for (int j = 0; j < NR; ++j) store(t.l + j * kLanes, load(t.sum + j * kLanes));
  return good;
}

// Scores of one block with masks, soft-capping and the true maximum; rescales what was summed before.
template <class Cells, int NR>
static void exact_block(const Strip& t, i64 begin, i64 end, bool masked, bool first) {
  constexpr int W = NR * kLanes;
  const int n = static_cast<int>(end - begin);
  // Scores stay unscaled until the maximum is subtracted, in one rounding; soft-capped ones are in log2 units at once.
  const bool plain = t.softcap == 0.f && t.scale_log2 != 0.f;
  const float factor = plain ? t.scale_log2 : 1.f;
  const Vec none = set1(-__builtin_inff()), hidden = set1(factor < 0.f ? __builtin_inff() : -__builtin_inff());
  RawTiles<Cells, NR> tiles{t, begin};
  for_tiles<score_rows(NR), true>(n, tiles);
  bool moved = false;
  for (int j = 0; j < NR; ++j) {
    Vec top = none;
    const Vec lo = load(t.lo + j * kLanes), hi = load(t.hi + j * kLanes);
    float* s = t.s + j * kLanes;
    for (int i = 0; i < n; ++i) {
      Vec x = load(s + i * W);
      if (t.softcap > 0.f) x = tanh(x * set1(t.scale / t.softcap)) * set1(t.softcap * kLog2E);
      else if (!plain) x = x * set1(0.f);
      if (masked && begin + i >= t.prefix) {
        const Vec at = set1(static_cast<float>(begin + i));
        x = select(and_(le(lo, at), lt(at, hi)), x, hidden);
      }
      top = max(top, x * set1(factor));
      store(s + i * W, x);
    }
    const Vec l = first ? zero() : load(t.l + j * kLanes);
    const Vec old = select(eq(l, zero()), none, first ? zero() : -load((const float*)(t.minus_m + j * kLanes)));
    const Vec m = max(old, top);
    const Vec safe = select(eq(m, none), zero(), m);  // no key so far: any reference will do
    const Vec shift = old - safe;
    const Vec keep = select(lt(shift, set1(-125.f)), zero(), exp2_clamped<F32Cells>(shift));
    moved = moved || !all(eq(keep, set1(1.f)));
    store(t.minus_m + j * kLanes, -safe);
    store(t.sum + j * kLanes, keep);
    Vec total = zero();
    Cell* p = t.p + j * kLanes;
    for (int i = 0; i < n; i += 2) {
      Vec y[2] = {zero(), zero()};
      for (int h = 0; h < smaller(2, n - i); ++h) {
        const Vec x = fma(load(s + (i + h) * W), set1(factor), -safe);
        y[h] = select(lt(x, set1(-125.f)), zero(), exp2_clamped<Cells>(x));
        total = total + y[h];
      }
      if constexpr (Cells::kDepth == 2) {
        store((float*)(p + i / 2 * W), Cells::join(y[0], y[1]));
      } else {
        store((float*)(p + i * W), y[0]);
        if (i + 1 < n) store((float*)(p + (i + 1) * W), y[1]);
      }
    }
    store(t.l + j * kLanes, fma(l, keep, total));
  }
  if (first || !moved) return;
  for (int d = 0; d < t.dim; ++d)
    for (int j = 0; j < NR; ++j) {
      float* o = t.o + (d * NR + j) * kLanes;
      store(o, load(o) * load(t.sum + j * kLanes));
    }
}

// All keys. `masked`: lo and hi hold; everything else is visible.
template <class Cells, int NR>
static void attend(const Strip& t, i64 len_k, bool masked, int lanes) {
  i64 begin = 0, end = len_k;  // all that any lane sees
  i64 near_from = 0, near_to = len_k, open_from = 0,
      open_to = len_k;  // outside the prefix: by some lane, by every lane
  if (masked) {
    float low = t.lo[0], high = t.hi[0], low_all = t.lo[0], high_all = t.hi[0];
    for (int i = 1; i < lanes; ++i) {
      low = t.lo[i] < low ? t.lo[i] : low;
      high = t.hi[i] > high ? t.hi[i] : high;
      low_all = t.lo[i] > low_all ? t.lo[i] : low_all;
      high_all = t.hi[i] < high_all ? t.hi[i] : high_all;
    }
    near_from = static_cast<i64>(low);
    near_to = static_cast<i64>(high);
    begin = t.prefix > 0 ? 0 : near_from / Cells::kDepth * Cells::kDepth;
    end = near_to > t.prefix ? near_to : t.prefix;
    open_from = static_cast<i64>(low_all);
    open_to = static_cast<i64>(high_all);
  }
  bool first = true;
  if (end > begin) {
    const i64 blocks = (end - begin + kBlockKeys<Cells> - 1) / kBlockKeys<Cells>;
    const i64 step = round_up((end - begin + blocks - 1) / blocks, 12);  // full tiles
    for (i64 at = begin; at < end; at += step) {
      const i64 to = at + step < end ? at + step : end;
      const bool open = !masked || to <= t.prefix || (at >= open_from && to <= open_to);
      if (at >= t.prefix && (to <= near_from || at >= near_to)) continue;
      if (!(open && t.softcap == 0.f && fast_block<Cells, NR>(t, at, to, first)))
        exact_block<Cells, NR>(t, at, to, !open, first);
      const i64 rows = row_cells<Cells>(static_cast<int>(to - at));
      ValueTiles<Cells, NR> tiles{t, t.v + at / Cells::kDepth * t.v_stride, static_cast<int>(rows), first};
      for_tiles<tile_rows(NR), false>(t.dim, tiles);
      first = false;
    }
  }
  if (first) {  // nothing to see
    for (int j = 0; j < NR; ++j) store(t.l + j * kLanes, zero()), store(t.minus_m + j * kLanes, zero());
    __builtin_memset(t.o, 0, sizeof(float) * static_cast<unsigned>(t.dim * NR * kLanes));
  }
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
