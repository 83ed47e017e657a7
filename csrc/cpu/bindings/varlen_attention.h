// vlmops_cpu::varlen_attention: checks of values, division of the work, threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../dispatch.h"
#include "../varlen_attention.h"
#include "common.h"

namespace vlmops {
namespace varlen_attention_binding {

using at::Tensor;

// cu_seqlens as int64 values, checked: 0 = first <= ... <= last = total.
inline std::vector<int64_t> sequence_starts(const char* name, const Tensor& cu, int64_t total) {
  TORCH_CHECK_VALUE(cu.dim() == 1 && cu.numel() >= 1, name, ": expected [n + 1] with a leading 0, got shape ",
                    cu.sizes());
  TORCH_CHECK_TYPE(cu.scalar_type() == at::kInt || cu.scalar_type() == at::kLong, name, ": expected int32, got ",
                   cu.scalar_type());
  const Tensor wide = cu.to(at::kLong).contiguous();
  const int64_t* values = wide.const_data_ptr<int64_t>();
  std::vector<int64_t> starts(values, values + wide.numel());
  TORCH_CHECK_VALUE(starts[0] == 0, name, ": expected to start at 0, got ", starts[0]);
  for (size_t i = 1; i < starts.size(); ++i) {
    TORCH_CHECK_VALUE(starts[i] >= starts[i - 1], name, ": expected to be monotone, got ", starts[i - 1], " then ",
                      starts[i], " at position ", i);
  }
  TORCH_CHECK_VALUE(starts.back() == total, name, ": expected to end at the number of tokens ", total, ", got ",
                    starts.back());
  return starts;
}

inline Tensor dense_rows(const Tensor& x) { return x.size(2) == 1 || x.stride(2) == 1 ? x : x.contiguous(); }

inline std::optional<Tensor> table(const char* name, const std::optional<Tensor>& x, int64_t tokens, int64_t dim) {
  if (!x.has_value()) return std::nullopt;
  TORCH_CHECK_VALUE(x->dim() == 2 && x->size(0) == tokens && x->size(1) == dim, name, ": expected shape [", tokens,
                    ", ", dim, "], got ", x->sizes());
  return x->to(at::kFloat).contiguous();
}

inline const float* data_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? x->const_data_ptr<float>() : nullptr;
}

// Runs fn(i, next, worker) for i < count on all threads. Each takes the next `batch` when it is done with its own, so
// that unequal tasks even out; `next` is what it will run after i, or -1.
template <class Fn>
void for_each_dynamic(int64_t count, int64_t workers, int64_t batch, const Fn& fn) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      int64_t mine = next.fetch_add(batch);
      while (mine < count) {
        const int64_t last = std::min(count, mine + batch);
        for (int64_t i = mine; i + 1 < last; ++i) fn(i, i + 1, worker);
        mine = next.fetch_add(batch);  // before the last of this batch, so that it can be looked at ahead
        fn(last - 1, mine < count ? mine : -1, worker);
      }
    }
  });
}

inline char* aligned(const Tensor& bytes) {
  const auto at = reinterpret_cast<uintptr_t>(bytes.data_ptr());
  return reinterpret_cast<char*>((at + 63) / 64 * 64);
}

inline int64_t round64(int64_t x) { return (x + 63) / 64 * 64; }

struct Plan {
  std::vector<VarlenTask> tasks;
  std::vector<VarlenTask> shared;  // one for each (sequence, key head) that several tasks read
  std::vector<int64_t> shared_at;  // byte offset of its packed K and V
  std::vector<int64_t> shared_of;  // index into shared of each task, or -1
  int64_t shared_bytes = 0;
  int64_t longest = 0;  // keys of a task that packs its own
};

// A (sequence, key head) is one task, unless that is too coarse for the threads: then runs of its query rows are.
inline Plan plan(const VarlenAttention& launch, const std::vector<int64_t>& starts_q,
                 const std::vector<int64_t>& starts_k, const std::vector<int64_t>& prefix, int64_t threads) {
  constexpr int64_t kStrip = 64;
  constexpr int64_t kShare = 4;  // tasks a thread should have to choose from
  Plan p;
  const int64_t group = launch.heads_q / launch.heads_kv;
  const size_t n = starts_q.size() - 1;
  double total = 0;
  std::vector<size_t> order;
  const auto cost = [&](size_t s) {
    return double(starts_q[s + 1] - starts_q[s]) * double(starts_k[s + 1] - starts_k[s] + 16);
  };
  for (size_t s = 0; s < n; ++s) {
    total += cost(s) * launch.heads_kv;
    if (starts_q[s + 1] > starts_q[s]) order.push_back(s);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return cost(a) > cost(b); });
  const double most = total / double(threads * kShare);
  for (const size_t s : order) {
    VarlenTask task{
        starts_q[s], starts_q[s + 1] - starts_q[s], starts_k[s], starts_k[s + 1] - starts_k[s], prefix[s], 0, 0, 0,
        nullptr};
    const int64_t rows = group * task.len_q, strips = (rows + kStrip - 1) / kStrip;
    const int64_t parts = threads == 1 ? 1 : std::clamp<int64_t>(int64_t(cost(s) / most), 1, strips);
    const int64_t step = (strips + parts - 1) / parts * kStrip;
    for (int head = 0; head < launch.heads_kv; ++head) {
      task.head_kv = head;
      const bool split = step < rows;
      if (split) {
        p.shared.push_back(task);
        p.shared_at.push_back(p.shared_bytes);
        p.shared_bytes += round64(VLMOPS_PICK(varlen_attention_packed_bytes)(&launch, task.len_k));
      } else {
        p.longest = std::max<int64_t>(p.longest, task.len_k);
      }
      for (int64_t first = 0; first < rows; first += step) {
        task.first = first;
        task.last = std::min(rows, first + step);
        p.tasks.push_back(task);
        p.shared_of.push_back(split ? int64_t(p.shared.size()) - 1 : -1);
      }
    }
  }
  return p;
}

std::tuple<Tensor, Tensor> varlen_attention(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double scale,
                                            bool causal, int64_t left, int64_t right,
                                            const std::optional<Tensor>& prefix_lens, double softcap,
                                            const std::optional<Tensor>& cos_q, const std::optional<Tensor>& sin_q,
                                            const std::optional<Tensor>& cos_k, const std::optional<Tensor>& sin_k,
                                            bool interleaved) {
  TORCH_CHECK_VALUE(q_in.dim() == 3, "q: expected [Tq, Hq, D], got shape ", q_in.sizes());
  TORCH_CHECK_VALUE(k_in.dim() == 3 && k_in.size(2) == q_in.size(2), "k: expected [Tk, Hkv, ", q_in.size(2),
                    "], got shape ", k_in.sizes());
  TORCH_CHECK_VALUE(v_in.sizes() == k_in.sizes(), "v: expected shape ", k_in.sizes(), " like k, got ", v_in.sizes());
  const int64_t tq = q_in.size(0), heads_q = q_in.size(1), dim = q_in.size(2), tk = k_in.size(0),
                heads_kv = k_in.size(1);
  TORCH_CHECK_VALUE(dim >= 1 && dim <= 512, "q: expected 1 <= head_dim <= 512, got ", dim);
  TORCH_CHECK_VALUE(heads_kv >= 1 && heads_q % heads_kv == 0, "k: expected a number of heads that divides q's ",
                    heads_q, ", got ", heads_kv);
  TORCH_CHECK_TYPE(k_in.scalar_type() == q_in.scalar_type(), "k: expected ", q_in.scalar_type(), " like q, got ",
                   k_in.scalar_type());
  TORCH_CHECK_TYPE(v_in.scalar_type() == q_in.scalar_type(), "v: expected ", q_in.scalar_type(), " like q, got ",
                   v_in.scalar_type());
  const int dtype = float_dtype(q_in, "q");
  const auto starts_q = sequence_starts("cu_seqlens_q", cu_seqlens_q, tq);
  const auto starts_k = sequence_starts("cu_seqlens_k", cu_seqlens_k, tk);
  TORCH_CHECK_VALUE(starts_k.size() == starts_q.size(), "cu_seqlens_k: expected ", starts_q.size(),
                    " values like cu_seqlens_q, got ", starts_k.size());
  std::vector<int64_t> prefix(starts_q.size() - 1, 0);
  if (prefix_lens.has_value()) {
    TORCH_CHECK_VALUE(prefix_lens->dim() == 1 && prefix_lens->numel() == int64_t(prefix.size()),
                      "prefix_lens: expected [", prefix.size(), "], got shape ", prefix_lens->sizes());
    const Tensor wide = prefix_lens->to(at::kLong).contiguous();
    for (size_t i = 0; i < prefix.size(); ++i) prefix[i] = std::max<int64_t>(0, wide.const_data_ptr<int64_t>()[i]);
  }
  std::optional<Tensor> cq, sq, ck, sk;
  if (cos_q.has_value()) {
    TORCH_CHECK_VALUE(dim % 2 == 0, "cos_q: expected an even head_dim, got ", dim);
    TORCH_CHECK_VALUE(sin_q.has_value() && cos_k.has_value() == sin_k.has_value(),
                      "sin_q, sin_k: expected beside cos_q, cos_k");
    TORCH_CHECK_VALUE(cos_k.has_value() || tk == tq, "cos_k: needed where k has ", tk, " tokens and q ", tq);
    cq = table("cos_q", cos_q, tq, dim);
    sq = table("sin_q", sin_q, tq, dim);
    ck = cos_k.has_value() ? table("cos_k", cos_k, tk, dim) : cq;
    sk = cos_k.has_value() ? table("sin_k", sin_k, tk, dim) : sq;
  }
  const Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  Tensor out = at::empty({tq, heads_q, dim}, q.options());
  Tensor lse = at::empty({heads_q, tq}, q.options().dtype(at::kFloat));
  if (out.numel() == 0) return {out, lse};

  static const float nothing = 0.f;  // an address for empty k and v, which have none
  const VarlenAttention launch{dtype,
                               q.const_data_ptr(),
                               tk > 0 ? k.const_data_ptr() : &nothing,
                               tk > 0 ? v.const_data_ptr() : &nothing,
                               out.data_ptr(),
                               lse.data_ptr<float>(),
                               q.stride(0),
                               q.stride(1),
                               k.stride(0),
                               k.stride(1),
                               v.stride(0),
                               v.stride(1),
                               tq,
                               int(heads_q),
                               int(heads_kv),
                               int(dim),
                               float(scale),
                               softcap > 0 ? float(softcap) : 0.f,
                               left,
                               causal ? 0 : right,
                               data_or_null(cq),
                               data_or_null(sq),
                               data_or_null(ck),
                               data_or_null(sk),
                               interleaved};
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  Plan work = plan(launch, starts_q, starts_k, prefix, threads);
  const int64_t tasks = int64_t(work.tasks.size()), workers = std::min(threads, tasks);
  const int64_t room = round64(VLMOPS_PICK(varlen_attention_scratch_bytes)(&launch, work.longest));
  const Tensor scratch = at::empty({room * workers + work.shared_bytes + 64}, q.options().dtype(at::kByte));
  char* base = aligned(scratch);
  char* packed = base + room * workers;
  const auto pack = VLMOPS_PICK(varlen_attention_pack);
  const auto run = VLMOPS_PICK(varlen_attention_run);
  for_each_dynamic(int64_t(work.shared.size()), workers, 1,
                   [&](int64_t i, int64_t, int64_t) { pack(&launch, &work.shared[i], packed + work.shared_at[i]); });
  for (int64_t i = 0; i < tasks; ++i)
    if (work.shared_of[i] >= 0) work.tasks[i].packed = packed + work.shared_at[work.shared_of[i]];
  const int64_t batch = std::clamp<int64_t>(tasks / (threads * 16), 1, heads_kv);
  for_each_dynamic(tasks, workers, batch, [&](int64_t i, int64_t next, int64_t worker) {
    run(&launch, &work.tasks[i], next >= 0 ? &work.tasks[next] : nullptr, base + room * worker);
  });
  return {out, lse};
}

}  // namespace varlen_attention_binding
}  // namespace vlmops

TORCH_LIBRARY_IMPL(vlmops_cpu, CPU, m) {
  m.impl("varlen_attention", &vlmops::varlen_attention_binding::varlen_attention);
}
