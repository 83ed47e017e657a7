#include "driver.h"

#include "../cpu/epilogue.h"

using namespace vlmops;
using namespace vlmops::budget;

namespace {

struct Case {
  const char* name;
  long long cols;
  int activation;
  bool scale, mask, residual;
};

// CLIP's activation, a gated branch behind a row mask, LayerScale and residual at a width of no whole vectors.
constexpr Case kCases[] = {
    {"quick_gelu 16x1280", 1280, kQuickGelu, false, false, false},
    {"factor mask residual 16x1024", 1024, kNoActivation, false, true, true},
    {"scale residual 16x1001", 1001, kNoActivation, true, false, true},
};

void rows(const Case& c, int product, int dtype) {
  constexpr long long kRows = 16;
  const long long n = kRows * c.cols;
  Epilogue a{};
  a.product = numbers(product, n);
  a.out = room(n * bytes(dtype));
  a.residual = c.residual ? numbers(dtype, n) : nullptr;
  a.scale = c.scale ? floats(c.cols) : nullptr;
  auto* mask = reinterpret_cast<unsigned char*>(room(kRows));
  for (int i = 0; i < kRows; ++i) mask[i] = i % 4 != 0;
  a.mask = c.mask ? mask : nullptr;
  a.factor = 0.5f;
  a.cols = c.cols;
  a.product_dtype = product;
  a.dtype = dtype;
  a.activation = c.activation;
  count("epilogue_rows", std::string(c.name) + " " + name(product) + " to " + name(dtype), a.out, dtype, n,
        [&] { kernels::epilogue_rows(a, 0, kRows); });
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    for (const int dtype : kFloats) {
      rows(c, dtype, dtype);
      if (dtype != kFloat32) rows(c, kFloat32, dtype);
    }
  }
}
