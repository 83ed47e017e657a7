// Warp collectives: shuffles, votes, ldmatrix, mma.sync.
#include <cstring>

#include "device.h"
#include "hopper.h"
#include "machine.h"
#include "memory.h"
#include "reports.h"
#include "requests.h"

namespace vlmops::simt {

namespace {

struct Shuffle {
  unsigned value, result;
  int source;
};
struct Ballot {
  bool predicate;
  unsigned result;
};
struct Ldmatrix {
  unsigned* registers;
  const char* row;
  int matrices;
  bool transposed;
};
struct Mma {
  float* c;
  const unsigned* a;
  unsigned b0, b1;
  bool bfloat16;
};

template <class T>
T& args_of(int warp, int lane) {
  return *static_cast<T*>(machine.fibers[warp * kLanes + lane].wait.args);
}

void shuffle(int warp) {
  ++counters.shuffles;
  unsigned values[kLanes];
  for (int l = 0; l < kLanes; ++l) values[l] = args_of<Shuffle>(warp, l).value;
  for (int l = 0; l < kLanes; ++l) {
    auto& args = args_of<Shuffle>(warp, l);
    args.result = values[args.source];
  }
}

void ballot(int warp) {
  ++counters.ballots;
  unsigned votes = 0;
  for (int l = 0; l < kLanes; ++l) votes |= static_cast<unsigned>(args_of<Ballot>(warp, l).predicate) << l;
  for (int l = 0; l < kLanes; ++l) args_of<Ballot>(warp, l).result = votes;
}

void ldmatrix(int warp) {
  ++counters.ldmatrices;
  const int matrices = args_of<Ldmatrix>(warp, 0).matrices;
  uint16_t m[4][8][8] = {};
  for (int i = 0; i < matrices; ++i) {
    Request request{};
    for (int r = 0; r < 8; ++r) {
      Fiber& fiber = machine.fibers[warp * kLanes + i * 8 + r];
      const char* row = args_of<Ldmatrix>(warp, i * 8 + r).row;
      if (!read_row(fiber, row)) {
        machine.aborted = true;
        return;
      }
      std::memcpy(m[i][r], row, 16);
      request.add(r, reinterpret_cast<uintptr_t>(row), 16);
    }
    count_shared(request, i == 0);
  }
  for (int l = 0; l < kLanes; ++l) {
    const auto& args = args_of<Ldmatrix>(warp, l);
    for (int i = 0; i < matrices; ++i) {
      const int row = l / 4, column = l % 4 * 2;
      const unsigned low = args.transposed ? m[i][column][row] : m[i][row][column];
      const unsigned high = args.transposed ? m[i][column + 1][row] : m[i][row][column + 1];
      args.registers[i] = low | high << 16;
    }
  }
}

float widen_bf16(unsigned half) { return __builtin_bit_cast(float, half << 16); }

float widen_fp16(unsigned half) {
  const unsigned sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return __builtin_bit_cast(float, sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // as a float with the exponent 112 too small, then scaled: exact for subnormals too
  const float scaled = __builtin_bit_cast(float, magnitude << 13) * 0x1p112f;
  return __builtin_bit_cast(float, __builtin_bit_cast(unsigned, scaled) | sign);
}

// The products are exact in float; the sum runs along k in float. Hardware keeps fewer bits of each addend but adds
// them in a wider register: results differ in the last bits.
void mma(int warp) {
  counters.mma_flops += 2 * 16 * 8 * 16;
  const bool bfloat16 = args_of<Mma>(warp, 0).bfloat16;
  const auto widen = [bfloat16](unsigned half) { return bfloat16 ? widen_bf16(half) : widen_fp16(half); };
  float a[16][16], b[16][8], c[16][8];
  for (int l = 0; l < kLanes; ++l) {
    const auto& args = args_of<Mma>(warp, l);
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      float* pair = &a[g + i % 2 * 8][t * 2 + i / 2 * 8];
      pair[0] = widen(args.a[i] & 0xffffu);
      pair[1] = widen(args.a[i] >> 16);
      c[g + i / 2 * 8][t * 2 + i % 2] = args.c[i];
    }
    for (int i = 0; i < 2; ++i) {
      const unsigned pair = i == 0 ? args.b0 : args.b1;
      b[t * 2 + i * 8][g] = widen(pair & 0xffffu);
      b[t * 2 + i * 8 + 1][g] = widen(pair >> 16);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < kLanes; ++l) {
    const auto& args = args_of<Mma>(warp, l);
    for (int i = 0; i < 4; ++i) args.c[i] = c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  }
}

void full_mask(unsigned mask, const char* what, const void* return_address) {
  if (mask == 0xffffffffu) return;
  report("divergence",
         text("thread %d: %s with the mask 0x%08x: collectives are for full warps", current->thread, what, mask),
         pc_of(return_address));
  fault();
}

}  // namespace

void perform(int warp, Op op) {
  switch (op) {
    case Op::kWarp:
      ++counters.warp_syncs;
      ++machine.warp_epoch[warp];
      join_clocks(warp * kLanes, warp * kLanes + kLanes);
      break;
    case Op::kShuffle: shuffle(warp); break;
    case Op::kBallot: ballot(warp); break;
    case Op::kLdmatrix: ldmatrix(warp); break;
    case Op::kMma: mma(warp); break;
    case Op::kProduct: issue_product(warp); break;
    case Op::kProductWait: finish_products(warp); break;
    default: break;
  }
}

}  // namespace vlmops::simt

using namespace vlmops::simt;

#define CALLER __builtin_return_address(0)

void vlmops_simt_sync_block(const char* file, int line) { wait_for({Op::kBlock, file, line, pc_of(CALLER), nullptr}); }

void vlmops_simt_sync_warp(unsigned mask, const char* file, int line) {
  full_mask(mask, "__syncwarp", CALLER);
  wait_for({Op::kWarp, file, line, pc_of(CALLER), nullptr});
}

unsigned vlmops_simt_shuffle(unsigned mask, unsigned value, int source, const char* file, int line) {
  full_mask(mask, "a shuffle", CALLER);
  Shuffle args{value, 0, source};
  wait_for({Op::kShuffle, file, line, pc_of(CALLER), &args});
  return args.result;
}

unsigned vlmops_simt_ballot(unsigned mask, bool predicate, const char* file, int line) {
  full_mask(mask, "a ballot", CALLER);
  Ballot args{predicate, 0};
  wait_for({Op::kBallot, file, line, pc_of(CALLER), &args});
  return args.result;
}

void vlmops_simt_ldmatrix(unsigned* registers, const void* row, int matrices, bool transposed, const char* file,
                          int line) {
  Ldmatrix args{registers, static_cast<const char*>(row), matrices, transposed};
  wait_for({Op::kLdmatrix, file, line, pc_of(CALLER), &args});
}

void vlmops_simt_mma_m16n8k16(float* c, const unsigned* a, unsigned b0, unsigned b1, bool bfloat16, const char* file,
                              int line) {
  Mma args{c, a, b0, b1, bfloat16};
  wait_for({Op::kMma, file, line, pc_of(CALLER), &args});
}
