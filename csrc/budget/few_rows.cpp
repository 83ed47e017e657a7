#include "driver.h"

#include "../cpu/few_rows.h"

using namespace vlmops;
using namespace vlmops::budget;

namespace {

void columns(long long rows, long long depth, long long cols, int dtype, int out, int activation, const char* label) {
  FewRows a{};
  a.x = floats(rows * depth);
  a.weight = numbers(dtype, cols * depth);
  a.bias = numbers(dtype, cols);
  a.out = room(rows * cols * bytes(out));
  a.rows = rows;
  a.cols = cols;
  a.depth = depth;
  a.dtype = dtype;
  a.out_dtype = out;
  a.activation = activation;
  std::string text = std::to_string(rows) + "x" + std::to_string(depth) + " to " + std::to_string(cols) + " " + label;
  text += std::string(text.back() == ' ' ? "" : " ") + name(dtype) + " to " + name(out);
  count("few_rows_columns", text, a.out, out, rows * cols, [&] { kernels::few_rows_columns(a, 0, cols); });
}

}  // namespace

int main() {
  for (const int dtype : kFloats) {
    columns(1, 1536, 128, dtype, dtype, kFewRowsNone, "");  // decoding: one token
    columns(1, 1536, 128, dtype, dtype, kFewRowsSilu, "silu");
    columns(4, 1536, 128, dtype, dtype, kFewRowsNone, "");
    columns(7, 1001, 61, dtype, dtype, kFewRowsGelu, "gelu");  // whole vectors nowhere
    if (dtype != kFloat32) columns(1, 1536, 128, dtype, kFloat32, kFewRowsNone, "");
  }
}
