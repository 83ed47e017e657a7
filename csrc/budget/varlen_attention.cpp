#include "driver.h"

#include "../cpu/varlen_attention.h"

using namespace vlmops;
using namespace vlmops::budget;

namespace {

struct Case {
  const char* name;
  long long tokens;
  int heads_q, heads_kv, dim;
  long long right;  // -1: all keys, 0: causal
  long long window;
  bool rope;
  float softcap;
};

// A tower's head, with its rotation; a decoder's group of heads; a window; a soft cap at an odd length.
constexpr Case kCases[] = {
    {"full 192 d80", 192, 1, 1, 80, -1, -1, false, 0.f},
    {"full rope 192 d80", 192, 1, 1, 80, -1, -1, true, 0.f},
    {"causal grouped 96 d128", 96, 4, 1, 128, 0, -1, false, 0.f},
    {"window 192 d64", 192, 1, 1, 64, 32, 32, false, 0.f},
    {"softcap 77 d72", 77, 1, 1, 72, -1, -1, false, 30.f},
};

void run(const Case& c, int dtype) {
  const long long width = static_cast<long long>(c.heads_q) * c.dim, rows = c.tokens * width;
  const long long width_kv = static_cast<long long>(c.heads_kv) * c.dim, rows_kv = c.tokens * width_kv;
  VarlenAttention a{};
  a.dtype = dtype;
  a.q = numbers(dtype, rows);
  a.k = numbers(dtype, rows_kv);
  a.v = numbers(dtype, rows_kv);
  a.out = room(rows * bytes(dtype));
  a.lse = zeros(c.tokens * c.heads_q);
  a.q_token = width;
  a.k_token = a.v_token = width_kv;
  a.q_head = a.k_head = a.v_head = c.dim;
  a.tokens_q = c.tokens;
  a.heads_q = c.heads_q;
  a.heads_kv = c.heads_kv;
  a.head_dim = c.dim;
  a.scale = 1.f / std::sqrt(static_cast<float>(c.dim));
  a.softcap = c.softcap;
  a.left = c.window;
  a.right = c.right;
  if (c.rope) a.cos_q = a.sin_q = a.cos_k = a.sin_k = floats(c.tokens * c.dim);
  VarlenTask task{0, c.tokens, 0, c.tokens, 0, 0, 0, c.tokens * (c.heads_q / c.heads_kv), nullptr};
  const std::string label = std::string(c.name) + " " + name(dtype);
  char* scratch = room(kernels::varlen_attention_scratch_bytes(&a, c.tokens));
  count("varlen_attention_run", label, a.out, dtype, rows,
        [&] { kernels::varlen_attention_run(&a, &task, nullptr, scratch); });
  // The same by keys and values that several tasks share.
  char* packed = room(kernels::varlen_attention_packed_bytes(&a, c.tokens));
  count("varlen_attention_pack", label, packed, kFloat32, c.dim,
        [&] { kernels::varlen_attention_pack(&a, &task, packed); });
  task.packed = packed;
  count("varlen_attention_run", label + ", packed before", a.out, dtype, rows,
        [&] { kernels::varlen_attention_run(&a, &task, nullptr, scratch); });
}

}  // namespace

int main() {
  for (const int dtype : kFloats) {
    for (const Case& c : kCases) run(c, dtype);
  }
}
