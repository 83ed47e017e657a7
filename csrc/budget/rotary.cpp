#include "driver.h"

#include "../cpu/rotary.h"

using namespace vlmops;
using namespace vlmops::budget;

namespace {

struct Case {
  const char* name;
  long long heads_q, heads_k, dim, turned;
  int interleaved, inverse;
};

// Qwen2-VL's tower, its gradient, Pixtral's pairs, and a decoder of grouped heads that turns half of each.
constexpr Case kCases[] = {
    {"halves 32x(4+4)x80", 4, 4, 80, 80, 0, 0},
    {"halves inverse 32x(4+4)x80", 4, 4, 80, 80, 0, 1},
    {"pairs 32x(4+4)x64", 4, 4, 64, 64, 1, 0},
    {"half turned 32x(6+2)x128", 6, 2, 128, 64, 0, 0},
};

void tokens(const Case& c, int dtype) {
  constexpr long long kTokens = 32;
  Rotary a{};
  a.num_parts = 2;
  for (int p = 0; p < 2; ++p) {
    const long long heads = p == 0 ? c.heads_q : c.heads_k, n = kTokens * heads * c.dim;
    a.parts[p] = {numbers(dtype, n), heads * c.dim, c.dim, room(n * bytes(dtype)), heads};
  }
  a.cos = floats(kTokens * c.turned);
  a.sin = floats(kTokens * c.turned);
  a.dim = c.dim;
  a.turned = c.turned;
  a.dtype = dtype;
  a.interleaved = c.interleaved;
  a.inverse = c.inverse;
  count("rotary_tokens", std::string(c.name) + " " + name(dtype), a.parts[1].out, dtype, kTokens * c.heads_k * c.dim,
        [&] { kernels::rotary_tokens(a, 0, kTokens); });
}

}  // namespace

int main() {
  for (const int dtype : kFloats) {
    for (const Case& c : kCases) tokens(c, dtype);
  }
}
