#include "driver.h"

#include "../cpu/norms.h"

using namespace vlmops;
using namespace vlmops::budget;

namespace {

constexpr long long kRows = 8;

struct Case {
  const char* name;
  long long cols;
  bool center, weight, bias, residual;
  float offset;
};

// RMSNorm as in Llama, as in Gemma, LayerNorm behind a residual, and a width that is no whole number of vectors.
constexpr Case kCases[] = {
    {"rms 8x1536", 1536, false, true, false, false, 0.f},
    {"rms offset 8x1152", 1152, false, true, false, false, 1.f},
    {"layer residual 8x1280", 1280, true, true, true, true, 0.f},
    {"layer plain 8x1001", 1001, true, false, false, false, 0.f},
};

void forward(const Case& c, int dtype, bool float_params) {
  const long long n = kRows * c.cols;
  NormForward a{};
  a.x = numbers(dtype, n);
  a.residual = c.residual ? numbers(dtype, n) : nullptr;
  a.total = c.residual ? room(n * bytes(dtype)) : nullptr;
  a.out = room(n * bytes(dtype));
  const int params = float_params ? kFloat32 : dtype;
  a.weight = c.weight ? numbers(params, c.cols) : nullptr;
  a.bias = c.bias ? numbers(params, c.cols) : nullptr;
  a.cols = c.cols;
  a.eps = 1e-6f;
  a.offset = c.offset;
  a.dtype = dtype;
  a.float_params = float_params;
  a.center = c.center;
  count("norm_forward", std::string(c.name) + " " + name(dtype) + (float_params ? ", fp32 weight" : ""), a.out, dtype,
        n, [&] { kernels::norm_forward(a, 0, kRows); });
}

void backward(const Case& c, int dtype) {
  const long long n = kRows * c.cols;
  NormBackward a{};
  a.grad = numbers(dtype, n);
  a.grad_total = c.residual ? numbers(dtype, n) : nullptr;
  // Not the numbers of grad: the gradient of a norm is 0 along its input.
  a.h = static_cast<const char*>(numbers(dtype, n + 8)) + 8 * bytes(dtype);
  a.weight = c.weight ? numbers(dtype, c.cols) : nullptr;
  a.dx = room(n * bytes(dtype));
  a.dweight = c.weight ? zeros(c.cols) : nullptr;
  a.dbias = c.bias ? zeros(c.cols) : nullptr;
  a.cols = c.cols;
  a.eps = 1e-6f;
  a.offset = c.offset;
  a.dtype = dtype;
  a.center = c.center;
  count("norm_backward", std::string(c.name) + " " + name(dtype), a.dx, dtype, n,
        [&] { kernels::norm_backward(a, 0, kRows); });
}

}  // namespace

int main() {
  for (const int dtype : kFloats) {
    for (const Case& c : kCases) {
      forward(c, dtype, false);
      backward(c, dtype);
    }
    if (dtype != kFloat32) forward(kCases[0], dtype, true);
  }
}
