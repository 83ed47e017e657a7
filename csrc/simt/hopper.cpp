// mbarrier, TMA, vector clocks. wgmma is in products.cpp.
#include "hopper.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

#include "checks.h"
#include "device.h"
#include "memory.h"
#include "module.h"
#include "products.h"
#include "reports.h"

namespace vlmops::simt {

namespace {

using Clock = std::vector<uint32_t>;

struct Barrier {
  uintptr_t address;
  int index;  // among the block's: what it lets arrive is written by the thread kMostThreads + index
  uint32_t count, pending, phase;
  int64_t bytes;  // of copies announced and not arrived
  Clock collected, complete;
  Access made;
  bool fenced;
};

// vlmops/backends/cuda_plan.py's TensorMap.packed(): the innermost dimension first.
struct TensorMap {
  uint64_t base;
  int64_t sizes[3], strides[3];  // elements; bytes
  uint32_t box[3], rank, item, swizzle;
};

struct TmaCopy {
  TensorMap map;
  int64_t at[3];
  uint32_t to;  // in the block's dynamic memory
  uint32_t bytes;
  uintptr_t barrier;
  uint32_t pc;
};

struct BarrierWait {
  uintptr_t barrier;
  uint32_t parity;
};

std::map<uintptr_t, Barrier> barriers;
std::vector<TmaCopy> copies;  // under way

size_t slot(int thread) {
  return static_cast<size_t>(thread >= kMostThreads ? thread - kMostThreads : kMostBarriers + thread);
}

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

void set(Clock& clock, int thread, uint32_t time) {
  if (clock.size() <= slot(thread)) clock.resize(slot(thread) + 1);
  clock[slot(thread)] = time;
}

std::string name_of(uintptr_t barrier) {
  const Region* region = locate(barrier, 8, "mbarrier", 0);
  return region != nullptr ? position(*region, barrier) : "?";
}

Barrier& barrier_at(const void* memory, const char* verb, uint32_t pc) {
  const auto found = barriers.find(reinterpret_cast<uintptr_t>(memory));
  if (found == barriers.end()) {
    report("mbarrier", text("%s by %s of a barrier that was never initialised", verb, running().c_str()), pc);
    fault();
  }
  Barrier& barrier = found->second;
  const Access& made = barrier.made;
  if (made.thread != current->thread && made.epoch == machine.epoch && !seen(made.thread, made.time)) {
    report("race", text("%s of the mbarrier %s by %s", verb, name_of(barrier.address).c_str(), running().c_str()), pc,
           text("not ordered after its initialisation by thread %d", made.thread), made.pc);
  }
  return barrier;
}

bool complete(const Barrier& barrier, uint32_t parity) { return (barrier.phase & 1) != parity; }

void try_complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
  join(barrier.complete, barrier.collected);
  barrier.collected.clear();
  set(barrier.complete, kMostThreads + barrier.index, barrier.phase);
}

void arrive(Barrier& barrier, uint32_t bytes, uint32_t pc) {
  if (barrier.pending == 0) {
    report("mbarrier",
           text("%s arrives at %s, where all %u of the phase have arrived", running().c_str(),
                name_of(barrier.address).c_str(), barrier.count),
           pc);
    fault();
  }
  set(current->clock, current->thread, current->time);
  join(barrier.collected, current->clock);
  ++current->time;
  barrier.bytes += bytes;
  --barrier.pending;
  try_complete(barrier);
}

std::string wrong(const TensorMap& map) {
  if (map.rank < 2 || map.rank > 3) return text("a map of %u dimensions", map.rank);
  if (map.base % 16 != 0) return "a base that is no multiple of 16 bytes";
  for (uint32_t i = 1; i < map.rank; ++i)
    if (map.strides[i] % 16 != 0) return "a stride that is no multiple of 16 bytes";
  for (uint32_t i = 0; i < map.rank; ++i)
    if (map.box[i] == 0 || map.box[i] > 256) return "a box of more than 256 elements";
  if (map.swizzle != 0 && map.swizzle != 3) return "a swizzle that is not implemented";
  if (map.swizzle == 3 && map.box[0] * map.item != 128) return "a swizzled box whose rows are not 128 bytes";
  return "";
}

// f(row of the box, first element's coordinates inside, bytes of it that are inside)
template <class F>
void each_row(const TmaCopy& copy, F f) {
  const TensorMap& m = copy.map;
  const auto inside = [&](int i, int64_t at) { return at >= 0 && at < m.sizes[i]; };
  for (uint32_t z = 0; z < m.box[2]; ++z) {
    for (uint32_t y = 0; y < m.box[1]; ++y) {
      const int64_t begin = std::max<int64_t>(copy.at[0], 0), end = std::min(copy.at[0] + m.box[0], m.sizes[0]);
      if (begin >= end || !inside(1, copy.at[1] + y) || !inside(2, copy.at[2] + z)) continue;
      const auto* from = reinterpret_cast<const char*>(m.base) + begin * m.item + (copy.at[1] + y) * m.strides[1] +
                         (copy.at[2] + z) * m.strides[2];
      f((z * m.box[1] + y) * m.box[0] * m.item + (begin - copy.at[0]) * m.item, from, (end - begin) * m.item);
    }
  }
}

void start(const TmaCopy& copy) {
  const uint32_t pc = copy.pc;
  ++counters.tma_copies;
  ++counters.global_load_requests;
  each_row(copy, [&](int64_t, const char* row, int64_t bytes) {
    const auto p = reinterpret_cast<uintptr_t>(row);
    Region* source = locate(p, static_cast<size_t>(bytes), "TMA", pc);
    if (source == nullptr) fault();
    if (module().hooked) check(*source, p, static_cast<size_t>(bytes), Kind::kRead, pc);
    const auto n = static_cast<uint64_t>(bytes);
    counters.global_load_bytes += n;
    counters.global_load_sectors += (p + n - 1) / 32 - p / 32 + 1;
    counters.global_load_sectors_least += (n + 31) / 32;
  });
  const auto p = reinterpret_cast<uintptr_t>(machine.dynamic) + copy.to;
  Region* target = locate(p, copy.bytes, "TMA", pc);
  if (target == nullptr) fault();
  check_products(p, copy.bytes, pc);
  if (!module().hooked) return;
  const Barrier& barrier = barriers.at(copy.barrier);
  check(*target, p, copy.bytes, Kind::kWrite, pc, true);
  Cell* cell = target->cell(p);
  for (size_t done = 0; done < copy.bytes; done += size_t{1} << target->shift, ++cell) {
    cell->write.thread = static_cast<uint16_t>(kMostThreads + barrier.index);
    cell->write.time = barrier.phase + 1;
  }
}

void finish(const TmaCopy& copy) {
  std::vector<char> box(copy.bytes, 0);
  each_row(copy, [&](int64_t offset, const char* row, int64_t bytes) {
    std::memcpy(box.data() + offset, row, static_cast<size_t>(bytes));
  });
  for (uint32_t i = 0; i < copy.bytes; i += 16) {
    const uint32_t to = copy.to + i;
    std::memcpy(machine.dynamic + (copy.map.swizzle == 3 ? swizzled(to) : to), box.data() + i, 16);
  }
  const auto p = reinterpret_cast<uintptr_t>(machine.dynamic) + copy.to;
  if (module().hooked) {
    Region* target = locate(p, copy.bytes, "TMA", copy.pc);
    Cell* cell = target->cell(p);
    for (size_t done = 0; done < copy.bytes; done += size_t{1} << target->shift, ++cell) cell->in_flight = false;
  }
  Barrier& barrier = barriers.at(copy.barrier);
  barrier.bytes -= copy.bytes;
  try_complete(barrier);
}

}  // namespace

bool seen(int thread, uint32_t time) {
  const Clock& clock = current->clock;
  return slot(thread) < clock.size() && clock[slot(thread)] >= time;
}

void join_clocks(int begin, int end) {
  if (barriers.empty()) return;
  Clock all;
  for (int t = begin; t < end; ++t) {
    Fiber& fiber = machine.fibers[t];
    set(fiber.clock, t, fiber.time++);
    join(all, fiber.clock);
  }
  for (int t = begin; t < end; ++t) machine.fibers[t].clock = all;
}

void begin_hopper_block() {
  barriers.clear();
  copies.clear();
  begin_products();
}

void end_hopper_block() {
  if (!copies.empty()) {
    report("async", text("the block ends with %zu TMA copies under way, the last at", copies.size()), copies.back().pc);
  }
  end_products();
}

int wake(int warp) {
  if (barriers.empty()) return -1;
  int found = -1;
  const int begin = warp * kLanes, end = std::min(begin + kLanes, machine.threads);
  for (int t = begin; t < end; ++t) {
    Fiber& fiber = machine.fibers[t];
    if (fiber.wait.op != Op::kBarrier) continue;
    found = std::max(found, 0);
    const auto& wait = *static_cast<const BarrierWait*>(fiber.wait.args);
    if (!complete(barriers.at(wait.barrier), wait.parity)) continue;
    fiber.wait.op = Op::kNone;
    found = 1;
  }
  return found;
}

bool land() {
  while (!copies.empty()) {
    size_t i = 0;
    if (machine.schedule == Schedule::kReverse) i = copies.size() - 1;
    if (machine.schedule == Schedule::kSeeded) i = machine.random() % copies.size();
    const TmaCopy copy = copies[i];
    copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(i));
    finish(copy);
    bool any = false;
    for (int w = 0; w < machine.warps; ++w) any = wake(w) > 0 || any;
    if (any) return true;
  }
  return false;
}

std::string waiting_for_barriers() {
  std::string all;
  uintptr_t last = 0;
  for (int t = 0; t < machine.threads; ++t) {
    const Fiber& fiber = machine.fibers[t];
    if (fiber.wait.op != Op::kBarrier) continue;
    const auto& wait = *static_cast<const BarrierWait*>(fiber.wait.args);
    if (wait.barrier == last) continue;  // with the one before
    last = wait.barrier;
    const Barrier& barrier = barriers.at(wait.barrier);
    const char* slash = std::strrchr(fiber.wait.file, '/');
    all += text(
        "%sthread %d waits (%s:%d) for parity %u of the mbarrier %s, in its phase %u, where %u arrivals and %lld "
        "bytes are missing",
        all.empty() ? "" : "; ", t, slash != nullptr ? slash + 1 : fiber.wait.file, fiber.wait.line, wait.parity,
        name_of(wait.barrier).c_str(), barrier.phase, barrier.pending, static_cast<long long>(barrier.bytes));
    if (all.size() > 1000) break;
  }
  return all;
}

}  // namespace vlmops::simt

using namespace vlmops::simt;

#define CALLER __builtin_return_address(0)

void vlmops_simt_mbarrier_init(void* memory, unsigned count) {
  const auto p = reinterpret_cast<uintptr_t>(memory);
  const uint32_t pc = pc_of(CALLER);
  const Region* region = locate(p, 8, "mbarrier", pc);
  if (region == nullptr) fault();
  if (!region->shared || p % 8 != 0 || count == 0 || count > 0xfffff) {
    report(
        "mbarrier",
        text("%s makes one that is not an aligned one in shared memory for 1 to 2^20 - 1 arrivals", running().c_str()),
        pc);
    fault();
  }
  if (barriers.size() == kMostBarriers) {
    report("mbarrier", text("more than %d barriers in a block", kMostBarriers), pc);
    fault();
  }
  Access made;
  made.epoch = machine.epoch;
  made.pc = pc;
  made.time = current->time;
  made.thread = static_cast<uint16_t>(current->thread);
  barriers[p] = Barrier{p, static_cast<int>(barriers.size()), count, count, 0, 0, {}, {}, made, false};
}

void vlmops_simt_mbarrier_fence() {
  for (auto& [address, barrier] : barriers)
    if (barrier.made.thread == current->thread) barrier.fenced = true;
}

void vlmops_simt_mbarrier_arrive(void* memory, unsigned bytes) {
  const uint32_t pc = pc_of(CALLER);
  arrive(barrier_at(memory, "arrival", pc), bytes, pc);
}

void vlmops_simt_mbarrier_wait(void* memory, unsigned parity, const char* file, int line) {
  const uint32_t pc = pc_of(CALLER);
  const Barrier& barrier = barrier_at(memory, "wait", pc);
  BarrierWait args{barrier.address, parity};
  while (!complete(barrier, parity)) wait_for({Op::kBarrier, file, line, pc, &args});
  join(current->clock, barrier.complete);
}

void vlmops_simt_fence_async_proxy() { current->proxy_time = ++current->time; }

unsigned vlmops_simt_shared_address(const void* memory) {
  const auto p = reinterpret_cast<uintptr_t>(memory), begin = reinterpret_cast<uintptr_t>(machine.dynamic);
  if (p < begin || p >= begin + machine.dynamic_bytes) {
    report("out-of-bounds", text("%s: a tile of TMA or wgmma that is not in dynamic shared memory", running().c_str()),
           pc_of(CALLER));
    fault();
  }
  return static_cast<unsigned>(p - begin);
}

void vlmops_simt_tma_load(void* shared, const void* map, void* memory, int rank, int x, int y, int z) {
  const uint32_t pc = pc_of(CALLER);
  const Barrier& barrier = barrier_at(memory, "TMA", pc);
  TmaCopy copy{};
  std::memcpy(&copy.map, map, sizeof copy.map);
  if (copy.map.rank == 2) {
    copy.map.sizes[2] = copy.map.box[2] = 1;
    copy.map.strides[2] = 0;
  }
  std::string bad = wrong(copy.map);
  if (bad.empty() && static_cast<uint32_t>(rank) != copy.map.rank) bad = text("a map of %u dimensions", copy.map.rank);
  if (bad.empty() && !barrier.fenced) bad = "an mbarrier without a fence after its initialisation";
  copy.to = vlmops_simt_shared_address(shared);
  if (bad.empty() && copy.to % (copy.map.swizzle == 3 ? 1024 : 128) != 0) bad = "a misaligned place in shared memory";
  if (!bad.empty()) {
    report("tma", text("a copy by %s with %s", running().c_str(), bad.c_str()), pc);
    fault();
  }
  copy.at[0] = x;
  copy.at[1] = y;
  copy.at[2] = z;
  copy.bytes = copy.map.box[0] * copy.map.box[1] * copy.map.box[2] * copy.map.item;
  copy.barrier = barrier.address;
  copy.pc = pc;
  start(copy);
  copies.push_back(copy);
}
