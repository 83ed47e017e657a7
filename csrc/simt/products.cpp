// wgmma.mma_async of a warpgroup, performed for each of its warps alone, when the warp waits for it: as late as may be.
// Until then the accumulators hold a NaN nobody else makes, so a kernel that uses them too early fails.
#include "products.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "device.h"
#include "hopper.h"
#include "memory.h"
#include "module.h"
#include "reports.h"

namespace vlmops::simt {

namespace {

constexpr uint32_t kPoison = 0x7fbadbad;
constexpr int kMostColumns = 256;

struct ProductArgs {
  float* d;
  const unsigned* a;  // registers, or null
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool accumulate, transposed, bfloat16;
};

struct Product {
  ProductArgs args;  // of lane 0
  unsigned a[kLanes][4];
  float* d[kLanes];
  uint32_t pc;
};

struct Accumulator {  // of products under way
  float* d[kLanes];
  int n, pending;
  std::vector<float> values;  // [lane, n / 2]
};

struct Warp {
  std::vector<Product> products;
  std::vector<size_t> groups;
  std::vector<Accumulator> accumulators;
  bool fenced = false;
  size_t issued = 0;
};

struct Issue {
  uint64_t a, b;
  int n;
  uint32_t pc;
};

struct TileRead {
  uintptr_t begin, end;
  int thread;
  uint32_t time, pc;
};

std::vector<Warp> warps;
std::vector<std::vector<Issue>> issues;  // by warpgroup
std::vector<TileRead> reads;             // that no copy has overwritten

struct Descriptor {
  uint32_t start, leading, stride, offset, swizzle;

  explicit Descriptor(uint64_t d)
      : start((d & 0x3fff) << 4),
        leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4),
        offset(d >> 49 & 7),
        swizzle(static_cast<uint32_t>(d >> 62)) {}
  // 16 bytes along k of a row, k along the rows.
  uint32_t along_k(int row, int chunk) const {
    return swizzled(start + static_cast<uint32_t>(row / 8) * stride +
                    static_cast<uint32_t>(row % 8 * 128 + chunk * 16));
  }
  // 16 bytes along n of one k: rows of 64 columns, the next 64 `leading` away, 8 of k `stride`.
  uint32_t along_n(int chunk, int k) const {
    return swizzled(start + static_cast<uint32_t>(chunk / 8) * leading + static_cast<uint32_t>(k / 8) * stride +
                    static_cast<uint32_t>(k % 8 * 128 + chunk % 8 * 16));
  }
};

[[noreturn]] void give_up() {
  machine.aborted = true;
  throw 0;
}

// Reads 16 bytes of a tile for lane 0 of the warp.
void read_chunk(uint32_t address, void* to, uint32_t pc, bool finished, uintptr_t& low, uintptr_t& high) {
  const auto p = reinterpret_cast<uintptr_t>(machine.dynamic) + address;
  Region* region = locate(p, 16, "wgmma", pc);
  if (region == nullptr) give_up();
  if (module().hooked) check_tile(*region, p, 16, pc, finished);
  std::memcpy(to, machine.dynamic + address, 16);
  low = std::min(low, p);
  high = std::max(high, p + 16);
}

float widen(unsigned half, bool bfloat16) {
  if (bfloat16) return __builtin_bit_cast(float, half << 16);
  const unsigned sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return __builtin_bit_cast(float, sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  return __builtin_bit_cast(float, __builtin_bit_cast(unsigned, scaled) | sign);
}

void remember(uintptr_t begin, uintptr_t end, uint32_t pc) {
  for (TileRead& r : reads) {
    if (r.begin == begin && r.end == end && r.thread == current->thread) {
      r.time = current->time;
      r.pc = pc;
      return;
    }
  }
  reads.push_back({begin, end, current->thread, current->time, pc});
}

// The operands of a warp's 16 rows: a [16, 16], b [16, n].
void read_operands(const Product& p, int warp, float* a, float* b, bool finished) {
  uint16_t chunk[8];
  uintptr_t low = ~uintptr_t{0}, high = 0;
  const bool bf = p.args.bfloat16;
  if (p.args.a == nullptr) {
    const Descriptor d(p.args.a_descriptor);
    for (int row = 0; row < 16; ++row) {
      for (int c = 0; c < 2; ++c) {
        read_chunk(d.along_k(warp % 4 * 16 + row, c), chunk, p.pc, finished, low, high);
        for (int i = 0; i < 8; ++i) a[row * 16 + c * 8 + i] = widen(chunk[i], bf);
      }
    }
    if (finished) remember(low, high, p.pc);
  } else {
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        float* pair = &a[(l / 4 + i % 2 * 8) * 16 + l % 4 * 2 + i / 2 * 8];
        pair[0] = widen(p.a[l][i] & 0xffffu, bf);
        pair[1] = widen(p.a[l][i] >> 16, bf);
      }
    }
  }
  low = ~uintptr_t{0};
  high = 0;
  const Descriptor d(p.args.b_descriptor);
  const int n = p.args.n;
  if (p.args.transposed) {
    for (int k = 0; k < 16; ++k) {
      for (int c = 0; c < n / 8; ++c) {
        read_chunk(d.along_n(c, k), chunk, p.pc, finished, low, high);
        for (int i = 0; i < 8; ++i) b[k * n + c * 8 + i] = widen(chunk[i], bf);
      }
    }
  } else {
    for (int row = 0; row < n; ++row) {
      for (int c = 0; c < 2; ++c) {
        read_chunk(d.along_k(row, c), chunk, p.pc, finished, low, high);
        for (int i = 0; i < 8; ++i) b[(c * 8 + i) * n + row] = widen(chunk[i], bf);
      }
    }
  }
  if (finished) remember(low, high, p.pc);
}

std::string wrong(const ProductArgs& args) {
  if (args.n < 8 || args.n > kMostColumns || args.n % 8 != 0) return text("%d columns", args.n);
  for (const bool second : {false, true}) {
    if (!second && args.a != nullptr) continue;
    const Descriptor d(second ? args.b_descriptor : args.a_descriptor);
    const char* name = second ? "B" : "A";
    if (d.swizzle != 1 || d.offset != 0) return text("a descriptor of %s without the 128-byte swizzle", name);
    const bool along_n = second && args.transposed;
    if ((d.start & (along_n ? 0x3ff : 0x38f)) != 0 || d.stride % 1024 != 0 || (along_n && d.leading % 1024 != 0))
      return text("a tile of %s that does not begin where the swizzle does", name);
    if (!along_n && (d.start & 127) + 32 > 128) return text("a step of %s past the end of its rows", name);
  }
  return "";
}

void perform_product(Warp& state, int warp, const Product& p) {
  static float a[16 * 16], b[16 * kMostColumns], c[16 * kMostColumns];
  counters.mma_flops += uint64_t{2} * 16 * 16 * static_cast<uint64_t>(p.args.n);
  read_operands(p, warp, a, b, true);
  const auto found = std::find_if(state.accumulators.begin(), state.accumulators.end(),
                                  [&](const Accumulator& x) { return x.d[0] == p.d[0]; });
  const int n = p.args.n, each = n / 2;
  const auto at = [&](int l, int i) -> float& {
    return c[(l / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + l % 4 * 2 + i % 2];
  };
  for (int l = 0; l < kLanes; ++l)
    for (int i = 0; i < each; ++i)
      at(l, i) = p.args.accumulate ? found->values[static_cast<size_t>(l * each + i)] : 0.f;
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < n; ++column) c[row * n + column] += a[row * 16 + k] * b[k * n + column];
  for (int l = 0; l < kLanes; ++l)
    for (int i = 0; i < each; ++i) found->values[static_cast<size_t>(l * each + i)] = at(l, i);
  --found->pending;
}

void write_back(Warp& state, int warp, uint32_t pc) {
  for (size_t x = 0; x < state.accumulators.size();) {
    Accumulator& acc = state.accumulators[x];
    if (acc.pending > 0) {
      ++x;
      continue;
    }
    const auto each = static_cast<size_t>(acc.n / 2);
    for (int l = 0; l < kLanes; ++l) {
      for (size_t i = 0; i < each; ++i) {
        if (__builtin_bit_cast(uint32_t, acc.d[l][i]) != kPoison) {
          report("wgmma", text("thread %d wrote an accumulator before wgmma.wait_group", warp * kLanes + l), pc);
          l = kLanes - 1;
          break;
        }
      }
    }
    for (int l = 0; l < kLanes; ++l) std::memcpy(acc.d[l], &acc.values[static_cast<size_t>(l) * each], each * 4);
    state.accumulators.erase(state.accumulators.begin() + static_cast<std::ptrdiff_t>(x));
  }
}

}  // namespace

void begin_products() {
  warps.assign(static_cast<size_t>(machine.warps), Warp{});
  issues.assign(static_cast<size_t>(machine.warps + 3) / 4, {});
  reads.clear();
}

void end_products() {
  for (int w = 0; w < machine.warps; ++w) {
    const Warp& warp = warps[static_cast<size_t>(w)];
    const auto& group = issues[static_cast<size_t>(w / 4)];
    if (!warp.products.empty()) {
      report("wgmma", text("warp %d ends with %zu products it never waited for", w, warp.products.size()),
             warp.products[0].pc);
    }
    if (warp.issued != group.size()) {
      report("wgmma", text("warp %d issued %zu of the %zu products of its warpgroup", w, warp.issued, group.size()),
             group[warp.issued].pc);
    }
  }
}

void check_products(uintptr_t p, size_t bytes, uint32_t pc) {
  for (size_t i = 0; i < reads.size();) {
    const TileRead& r = reads[i];
    if (r.end <= p || r.begin >= p + bytes) {
      ++i;
      continue;
    }
    if (r.thread != current->thread && !seen(r.thread, r.time)) {
      report("race", text("a TMA copy by %s", running().c_str()), pc,
             text("not ordered after the wgmma of warp %d that reads what it overwrites", r.thread / kLanes), r.pc);
    }
    reads.erase(reads.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void issue_product(int warp) {
  Warp& state = warps[static_cast<size_t>(warp)];
  Fiber* const fibers = &machine.fibers[static_cast<size_t>(warp * kLanes)];
  Product product{};
  product.args = *static_cast<const ProductArgs*>(fibers[0].wait.args);
  product.pc = fibers[0].wait.pc;
  std::string bad = wrong(product.args);
  for (int l = 0; l < kLanes; ++l) {
    const auto& args = *static_cast<const ProductArgs*>(fibers[l].wait.args);
    if (args.a_descriptor != product.args.a_descriptor || args.b_descriptor != product.args.b_descriptor ||
        args.accumulate != product.args.accumulate)
      bad = text("descriptors that differ between threads %d and %d", fibers[0].thread, fibers[l].thread);
    product.d[l] = args.d;
    if (args.a != nullptr) std::memcpy(product.a[l], args.a, sizeof product.a[l]);
  }
  auto& group = issues[static_cast<size_t>(warp / 4)];
  const Issue issue{product.args.a_descriptor, product.args.b_descriptor, product.args.n, product.pc};
  if (state.issued == group.size()) group.push_back(issue);
  const Issue& same = group[state.issued++];
  if (same.a != issue.a || same.b != issue.b || same.n != issue.n) bad = "operands that differ in its warpgroup";
  if (!state.fenced) bad = "registers no wgmma.fence has ordered";
  if (!bad.empty()) {
    report("wgmma", text("warp %d issues a product with %s", warp, bad.c_str()), product.pc);
    machine.aborted = true;
    return;
  }
  current = &fibers[0];
  try {
    static float a[16 * 16], b[16 * kMostColumns];
    if (module().hooked) read_operands(product, warp, a, b, false);
  } catch (int) {
  }
  current = nullptr;
  const auto found = std::find_if(state.accumulators.begin(), state.accumulators.end(),
                                  [&](const Accumulator& x) { return x.d[0] == product.d[0]; });
  if (found == state.accumulators.end()) {
    Accumulator acc{};
    acc.n = product.args.n;
    acc.pending = 1;
    const auto each = static_cast<size_t>(acc.n / 2);
    acc.values.resize(kLanes * each);
    for (size_t l = 0; l < kLanes; ++l) {
      acc.d[l] = product.d[l];
      std::memcpy(&acc.values[l * each], product.d[l], each * 4);
      for (size_t i = 0; i < each; ++i) std::memcpy(&product.d[l][i], &kPoison, 4);
    }
    state.accumulators.push_back(std::move(acc));
  } else {
    ++found->pending;
  }
  state.products.push_back(product);
}

void finish_products(int warp) {
  Warp& state = warps[static_cast<size_t>(warp)];
  Fiber& fiber = machine.fibers[static_cast<size_t>(warp * kLanes)];
  const auto left = *static_cast<const size_t*>(fiber.wait.args);
  state.fenced = false;
  if (state.groups.size() <= left) return;
  const size_t finished = state.groups.size() - left, count = state.groups[finished - 1];
  current = &fiber;
  try {
    for (size_t i = 0; i < count; ++i) perform_product(state, warp, state.products[i]);
  } catch (int) {
  }
  current = nullptr;
  state.products.erase(state.products.begin(), state.products.begin() + static_cast<std::ptrdiff_t>(count));
  state.groups.erase(state.groups.begin(), state.groups.begin() + static_cast<std::ptrdiff_t>(finished));
  for (size_t& end : state.groups) end -= count;
  write_back(state, warp, fiber.wait.pc);
}

}  // namespace vlmops::simt

using namespace vlmops::simt;

#define CALLER __builtin_return_address(0)

void vlmops_simt_wgmma_fence() {
  if (current->lane == 0) warps[static_cast<size_t>(current->warp)].fenced = true;
}

void vlmops_simt_wgmma_commit() {
  if (current->lane != 0) return;
  Warp& warp = warps[static_cast<size_t>(current->warp)];
  warp.groups.push_back(warp.products.size());
}

void vlmops_simt_wgmma_wait(int groups, const char* file, int line) {
  size_t left = static_cast<size_t>(groups);
  wait_for({Op::kProductWait, file, line, pc_of(CALLER), &left});
}

void vlmops_simt_wgmma(float* d, const unsigned* a, unsigned long long a_descriptor, unsigned long long b_descriptor,
                       int n, bool accumulate, bool transposed, bool bfloat16, const char* file, int line) {
  ProductArgs args{d, a, a_descriptor, b_descriptor, n, accumulate, transposed, bfloat16};
  wait_for({Op::kProduct, file, line, pc_of(CALLER), &args});
}
