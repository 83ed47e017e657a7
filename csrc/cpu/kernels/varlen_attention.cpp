// varlen_attention, forward: from a task to strips of queries and back to rows of the output.
#include "../varlen_attention.h"

#include "varlen_attention_core.h"

namespace vlmops {
namespace VLMOPS_ISA {

struct Buffers {
  char* next;
  template <class P>
  P* take(i64 count) {
    char* at = next;
    next += round_up(count * static_cast<i64>(sizeof(P)), 64);
    return reinterpret_cast<P*>(at);
  }
};

template <class Cells>
static i64 strip_bytes(int dim) {
  const i64 block = kBlockKeys<Cells> + 16, cells = row_cells<Cells>(dim);
  return kMaxStrip * 4 * (2 * cells + 2 * block + dim + 5) + 16 * 64;
}

// Rows of the output from O^T: divided by the row sum, rounded, transposed (as cells where the output is made of them).
template <class Cells, int NR, class T>
static void write_rows(const Strip& t, T* const* rows, int lanes) {
  constexpr int W = NR * kLanes;
  const bool paired = Cells::kDepth == 2 && reads_in_place<Cells, T>(t.dim);
  const int count = paired ? t.cells : t.dim;
  for (int g = 0; g * kLanes < lanes; ++g) {
    const Vec l = load(t.l + g * kLanes);
    const Mask none = eq(l, zero());  // a query without keys: 0, whatever was summed
    const Vec inverse = set1(1.f) / l;
    for (int x = 0; x < count; x += kLanes) {
      const int n = smaller(kLanes, count - x);
      const auto element = [&](int d) { return select(none, zero(), load(t.o + d * W + g * kLanes) * inverse); };
      Vec r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int from = i < n ? x + i : x;
        if constexpr (Cells::kDepth == 2)
          r[i] = paired ? Cells::join_any(element(2 * from), element(2 * from + 1)) : element(from);
        else r[i] = element(from);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (g * kLanes + i >= lanes) continue;
        T* row = rows[g * kLanes + i];
        if (paired) store_n(reinterpret_cast<float*>(reinterpret_cast<Cell*>(row) + x), r[i], n);
        else store_n(row + x, r[i], n);
      }
    }
  }
}

// What to fetch during a strip: the queries of the next one; during the last, also the first keys of the next task.
template <class T>
static void look_ahead(const VarlenAttention& a, const VarlenTask& task, const VarlenTask* next, i64 row,
                       Ahead& ahead) {
  constexpr i64 kSize = sizeof(T);
  ahead.clear(a.head_dim * static_cast<int>(kSize));
  if (row >= task.last && next == nullptr) return;
  const VarlenTask& to = row < task.last ? task : *next;
  if (row >= task.last) row = next->first;
  const i64 query = row % to.len_q, head = to.head_kv * (a.heads_q / a.heads_kv) + row / to.len_q;
  const i64 left = to.len_q - query < kMaxStrip ? to.len_q - query : kMaxStrip;
  ahead.add(static_cast<const T*>(a.q) + (to.start_q + query) * a.q_token + head * a.q_head, a.q_token * kSize, left,
            false);
  if (&to == &task || to.packed != nullptr) return;
  ahead.add(static_cast<const T*>(a.k) + to.start_k * a.k_token + to.head_kv * a.k_head, a.k_token * kSize, to.len_k,
            false);
  ahead.add(static_cast<const T*>(a.v) + to.start_k * a.v_token + to.head_kv * a.v_head, a.v_token * kSize, to.len_k,
            false);
}

template <class Cells, class T, int NR>
static void run_strip(const VarlenAttention& a, const VarlenTask& task, const VarlenTask* next, Strip& t, Cell* staging,
                      i64 row, int lanes) {
  const int dim = a.head_dim, group = a.heads_q / a.heads_kv;
  const bool masked = a.left >= 0 || a.right >= 0;
  const Cell* rows[kMaxStrip];
  T* out[kMaxStrip];
  float* lse[kMaxStrip];
  i64 head = task.head_kv * group + row / task.len_q, query = row % task.len_q;
  for (int i = 0; i < lanes; ++i) {
    const i64 token = task.start_q + query;
    const T* src = static_cast<const T*>(a.q) + token * a.q_token + head * a.q_head;
    if (a.cos_q == nullptr && reads_in_place<Cells, T>(dim)) {
      rows[i] = reinterpret_cast<const Cell*>(src);
    } else {
      Cell* dst = staging + i64(i) * t.cells;
      Angles at = {nullptr, nullptr};
      if (a.cos_q != nullptr) at = {a.cos_q + token * dim, a.sin_q + token * dim};
      copy_row<Cells>(src, dst, dim, at, a.interleaved);
      rows[i] = dst;
    }
    out[i] = static_cast<T*>(a.out) + (token * a.heads_q + head) * dim;
    lse[i] = a.lse + head * a.tokens_q + token;
    if (masked) {
      const i64 p = query + task.len_k - task.len_q;
      i64 lo = a.left >= 0 ? p - a.left : 0, hi = a.right >= 0 ? p + a.right + 1 : task.len_k;
      lo = lo < 0 ? 0 : lo > task.len_k ? task.len_k : lo;
      hi = hi < lo ? lo : hi > task.len_k ? task.len_k : hi;
      t.lo[i] = static_cast<float>(lo);
      t.hi[i] = static_cast<float>(hi);
    }
    if (++query == task.len_q) query = 0, ++head;
  }
  for (int i = lanes; i < NR * kLanes; ++i) {  // lanes without a query see what the first one sees
    rows[i] = reinterpret_cast<const Cell*>(kZeros);
    if (masked) t.lo[i] = t.lo[0], t.hi[i] = t.hi[0];
  }
  transpose_rows<NR>(rows, t.cells, t.q);
  look_ahead<T>(a, task, next, row + lanes, *t.ahead);
  t.ahead->add(out[0], i64(a.heads_q) * dim * static_cast<i64>(sizeof(T)), lanes < task.len_q ? lanes : task.len_q,
               true);
  attend<Cells, NR>(t, task.len_k, masked, lanes);
  write_rows<Cells, NR>(t, out, lanes);
  for (int g = 0; g * kLanes < lanes; ++g) {
    const Vec l = load(t.l + g * kLanes);
    const Vec x = fnma(load(t.minus_m + g * kLanes), set1(kLn2), log(l));
    float tmp[kLanes];
    store(tmp, select(eq(l, zero()), set1(-__builtin_inff()), select(eq(l, l), x, l)));
    for (int i = 0; i < smaller(kLanes, lanes - g * kLanes); ++i) *lse[g * kLanes + i] = tmp[i];
  }
}

template <class Cells, class T>
static void run_task(const VarlenAttention& a, const VarlenTask& task, const VarlenTask* next, void* scratch) {
  const int dim = a.head_dim;
  Buffers room = {static_cast<char*>(scratch)};
  Ahead ahead;
  Strip t;
  t.ahead = &ahead;
  t.dim = dim;
  t.cells = row_cells<Cells>(dim);
  t.scale = a.scale;
  t.scale_log2 = a.scale * kLog2E;
  t.softcap = a.softcap;
  t.prefix = task.prefix < task.len_k ? task.prefix : task.len_k;
  t.q = room.take<Cell>(i64(t.cells) * kMaxStrip);
  t.p = room.take<Cell>((kBlockKeys<Cells> + 16) * kMaxStrip);
  t.s = room.take<float>((kBlockKeys<Cells> + 16) * kMaxStrip);
  t.o = room.take<float>(i64(dim) * kMaxStrip);
  t.minus_m = room.take<float>(kMaxStrip);
  t.l = room.take<float>(kMaxStrip);
  t.sum = room.take<float>(kMaxStrip);
  t.lo = room.take<float>(kMaxStrip);
  t.hi = room.take<float>(kMaxStrip);
  Cell* staging = room.take<Cell>(i64(t.cells) * kMaxStrip);

  // K and V: packed by the caller, or here; read in place where one strip would not earn the copy back.
  const bool in_place = reads_in_place<Cells, T>(dim) && a.k_token % Cells::kDepth == 0 &&
                        task.last - task.first <= kMaxStrip && task.packed == nullptr;
  char* packed = task.packed != nullptr ? static_cast<char*>(const_cast<void*>(task.packed)) : room.take<char>(0);
  t.k = reinterpret_cast<const Cell*>(packed);
  t.k_stride = t.cells;
  t.v = reinterpret_cast<const Cell*>(packed + packed_keys_bytes<Cells>(dim, task.len_k));
  t.v_stride = dim;
  if (in_place && a.cos_k == nullptr) {
    t.k =
        reinterpret_cast<const Cell*>(static_cast<const T*>(a.k) + task.start_k * a.k_token + task.head_kv * a.k_head);
    t.k_stride = a.k_token / Cells::kDepth;
  } else if (task.packed == nullptr) {
    pack_keys<Cells, T>(a, task, const_cast<Cell*>(t.k));
  }
  if (in_place && Cells::kDepth == 1) {
    t.v =
        reinterpret_cast<const Cell*>(static_cast<const T*>(a.v) + task.start_k * a.v_token + task.head_kv * a.v_head);
    t.v_stride = a.v_token;
  } else if (task.packed == nullptr) {
    pack_values<Cells, T>(a, task, const_cast<Cell*>(t.v));
  }

  for (i64 row = task.first; row < task.last; row += kMaxStrip) {
    const int lanes = static_cast<int>(task.last - row < kMaxStrip ? task.last - row : kMaxStrip);
    const int nr = (lanes + kLanes - 1) / kLanes;
    if (nr == 1) run_strip<Cells, T, 1>(a, task, next, t, staging, row, lanes);
    if (nr == 2) run_strip<Cells, T, 2>(a, task, next, t, staging, row, lanes);
    if constexpr (kMaxNR > 2) {
      if (nr == 3) run_strip<Cells, T, 3>(a, task, next, t, staging, row, lanes);
      if (nr == 4) run_strip<Cells, T, 4>(a, task, next, t, staging, row, lanes);
    }
  }
}

#if VLMOPS_BF16_CELLS
typedef BF16Cells CellsOfBF16;
#else
typedef F32Cells CellsOfBF16;
#endif

i64 varlen_attention_packed_bytes(const VarlenAttention* a, i64 len_k) {
  return a->dtype == kBFloat16 ? packed_bytes<CellsOfBF16>(a->head_dim, len_k)
                               : packed_bytes<F32Cells>(a->head_dim, len_k);
}

i64 varlen_attention_scratch_bytes(const VarlenAttention* a, i64 max_len_k) {
  const i64 strip = a->dtype == kBFloat16 ? strip_bytes<CellsOfBF16>(a->head_dim) : strip_bytes<F32Cells>(a->head_dim);
  return strip + varlen_attention_packed_bytes(a, max_len_k);
}

template <class Cells, class T>
static void pack_task(const VarlenAttention& a, const VarlenTask& task, void* packed) {
  pack_keys<Cells, T>(a, task, static_cast<Cell*>(packed));
  void* values = static_cast<char*>(packed) + packed_keys_bytes<Cells>(a.head_dim, task.len_k);
  pack_values<Cells, T>(a, task, static_cast<Cell*>(values));
}

void varlen_attention_pack(const VarlenAttention* a, const VarlenTask* task, void* packed) {
  if (a->dtype == kBFloat16) pack_task<CellsOfBF16, BF16>(*a, *task, packed);
  else if (a->dtype == kFloat16) pack_task<F32Cells, FP16>(*a, *task, packed);
  else pack_task<F32Cells, float>(*a, *task, packed);
}

void varlen_attention_run(const VarlenAttention* a, const VarlenTask* task, const VarlenTask* next, void* scratch) {
  if (a->dtype == kBFloat16) run_task<CellsOfBF16, BF16>(*a, *task, next, scratch);
  else if (a->dtype == kFloat16) run_task<F32Cells, FP16>(*a, *task, next, scratch);
  else run_task<F32Cells, float>(*a, *task, next, scratch);
}

}  // namespace VLMOPS_ISA
}  // namespace vlmops
