// varlen_attention, forward: what a launch is, and the entry points of its kernel.
//
// Source: online softmax as in FlashAttention-2 (Dao, 2023). The layout is our own: scores are kept transposed
// (keys down, queries across the vector lanes), so that K is read in place, the softmax never reduces across lanes,
// and neither the number of keys nor head_dim is padded.
#pragma once

#include "isa.h"

namespace vlmops {

struct VarlenAttention {  // one launch; strides in elements
  int dtype;              // DType of q, k, v, out
  const void* q;
  const void* k;
  const void* v;
  void* out;   // [tokens_q, heads_q, head_dim] contiguous
  float* lse;  // [heads_q, tokens_q]
  long long q_token, q_head, k_token, k_head, v_token, v_head;
  long long tokens_q;
  int heads_q, heads_kv, head_dim;
  float scale, softcap;   // softcap 0: none
  long long left, right;  // -1: unbounded; causal is right = 0
  const float* cos_q;     // [tokens_q, head_dim] or null
  const float* sin_q;
  const float* cos_k;  // [tokens_k, head_dim]
  const float* sin_k;
  bool interleaved;
};

// Rows [first, last) of one (sequence, key head). A row is a query of one of the heads that share the key head:
// row = (head in the group) * len_q + query.
struct VarlenTask {
  long long start_q, len_q, start_k, len_k, prefix;
  int head_kv;
  long long first, last;
  const void* packed;  // K and V as varlen_attention_pack left them; null: the task prepares its own
};

}  // namespace vlmops

// Bytes of one packed (sequence, key head).
VLMOPS_DECLARE(long long, varlen_attention_packed_bytes, const VarlenAttention* launch, long long len_k)
// Bytes of scratch one thread needs for tasks of at most max_len_k keys, room for packing included.
VLMOPS_DECLARE(long long, varlen_attention_scratch_bytes, const VarlenAttention* launch, long long max_len_k)
// packed: 64-byte aligned.
VLMOPS_DECLARE(void, varlen_attention_pack, const VarlenAttention* launch, const VarlenTask* task, void* packed)
// next: the task this thread will probably run after this one, or null. scratch: 64-byte aligned.
VLMOPS_DECLARE(void, varlen_attention_run, const VarlenAttention* launch, const VarlenTask* task,
               const VarlenTask* next, void* scratch)
