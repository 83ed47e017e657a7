// The one file that includes torch. A new op adds a line below, and bindings/<op>.h registers what cpu.py defined.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "dispatch.h"

#include "bindings/epilogue.h"
#include "bindings/few_rows.h"
#include "bindings/norms.h"
#include "bindings/patchify.h"
#include "bindings/rotary.h"
#include "bindings/varlen_attention.h"

namespace {

std::string isa() { return vlmops::isa_name(vlmops::current_isa()); }

// How many threads at::parallel_for really uses: without -fopenmp it is one, silently.
int64_t num_threads() {
  std::vector<char> seen(at::get_num_threads(), 0);
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { seen[at::get_thread_num()] = 1; });
  return std::count(seen.begin(), seen.end(), 1);
}

}  // namespace

TORCH_LIBRARY_IMPL(vlmops_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", &isa);
  m.impl("num_threads", &num_threads);
}
