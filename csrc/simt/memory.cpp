#include "memory.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "checks.h"
#include "module.h"
#include "reports.h"
#include "requests.h"
#include "shadow.h"

namespace vlmops::simt {

Counters counters;

namespace {

constexpr size_t kMostShared = 227 * 1024;  // per block on sm_90; sm_80 has 163 KiB, sm_86 and sm_120 99 KiB
constexpr size_t kGuard = 64 * 1024;
constexpr uint64_t kMostAccesses = uint64_t{1} << 22;  // of a thread between two collectives

alignas(1024) char dynamic_memory[kMostShared + kGuard];

std::vector<std::unique_ptr<Region>> buffers;        // by address, disjoint
std::vector<std::unique_ptr<Region>> shared_memory;  // of the launch: static variables, dynamic memory
std::vector<Region*> regions;                        // both, by address
Region* last_found;

Region* find(uintptr_t p) {
  if (last_found != nullptr && p >= last_found->begin && p < last_found->end) return last_found;
  auto after = std::upper_bound(regions.begin(), regions.end(), p,
                                [](uintptr_t address, const Region* r) { return address < r->begin; });
  if (after == regions.begin()) return nullptr;
  Region* region = *(after - 1);
  if (p >= region->end) return nullptr;
  return last_found = region;
}

// For an address outside every region: the nearest one below, or above.
std::string outside(uintptr_t p, size_t bytes) {
  if (p < 65536) return text("the null pointer + %zu", static_cast<size_t>(p));
  for (const Fiber& fiber : machine.fibers) {
    const auto stack = reinterpret_cast<uintptr_t>(fiber.context.stack);
    if (p - stack < kStackBytes) return text("a private variable of thread %d", fiber.thread);
  }
  const Region* below = nullptr;
  const Region* above = nullptr;
  for (const Region* r : regions) {
    if (r->begin <= p) below = r;
    if (r->begin > p && above == nullptr) above = r;
  }
  const size_t past = below != nullptr ? p + bytes - below->end : ~size_t{0};
  const size_t before = above != nullptr ? above->begin - p : ~size_t{0};
  const auto named = [](const Region& r) {
    return text("%s%s (%zu bytes)", r.shared ? "shared " : "", r.name.c_str(), static_cast<size_t>(r.end - r.begin));
  };
  if (past <= before && past < (size_t{1} << 32))
    return text("%zu bytes past the end of %s", past, named(*below).c_str());
  if (before < (size_t{1} << 32)) return text("%zu bytes before %s", before, named(*above).c_str());
  return text("address 0x%zx, in no buffer", static_cast<size_t>(p));
}

}  // namespace

Region* locate(uintptr_t p, size_t bytes, const char* verb, uint32_t pc) {
  Region* region = find(p);
  if (region != nullptr && p + bytes <= region->end) return region;
  report("out-of-bounds",
         text("%s of %zu bytes by %s reaches %s", verb, bytes, running().c_str(), outside(p, bytes).c_str()), pc);
  return nullptr;
}

namespace {

bool aligned(uintptr_t p, size_t bytes, const char* verb, uint32_t pc) {
  if (p % bytes == 0) return true;
  report("misaligned",
         text("%s of %zu bytes by %s at an address that is %zu past a multiple of %zu", verb, bytes, running().c_str(),
              static_cast<size_t>(p % bytes), bytes),
         pc);
  return false;
}

}  // namespace

uint32_t pc_of(const void* return_address) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(return_address) - module().base);
}

void register_buffer(const void* memory, size_t bytes, const char* name, bool initialised) {
  if (bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  auto merged = std::make_unique<Region>(begin, end, name, false);
  std::vector<std::unique_ptr<Region>> overlapping, rest;
  for (auto& b : buffers) (b->begin < end && begin < b->end ? overlapping : rest).push_back(std::move(b));
  if (!overlapping.empty()) {  // views of one tensor: one region of all its names
    uintptr_t low = begin, high = end;
    std::string names;
    for (const auto& b : overlapping) {
      low = std::min(low, b->begin);
      high = std::max(high, b->end);
      names += b->name + "|";
    }
    const bool same = overlapping.size() == 1 && overlapping[0]->begin == begin && overlapping[0]->end == end;
    merged = std::make_unique<Region>(low, high, same ? std::string(name) : names + name, false);
    for (const auto& b : overlapping) {
      const uintptr_t step = uintptr_t{1} << b->shift;
      for (uintptr_t p = b->begin; p < b->end;) {
        const uintptr_t next = std::min(b->end, (p & ~(step - 1)) + step);
        if (b->cell(p)->initialised && !same) merged->initialise(p, next, true);
        p = next;
      }
    }
  }
  if (initialised) merged->initialise(begin, end, true);
  rest.push_back(std::move(merged));
  std::sort(rest.begin(), rest.end(), [](const auto& a, const auto& b) { return a->begin < b->begin; });
  buffers = std::move(rest);
}

void clear_buffers() {
  buffers.clear();
  regions.clear();
  last_found = nullptr;
}

bool begin_launch(size_t dynamic_bytes) {
  shared_memory.clear();
  regions.clear();
  forget_releases();
  last_found = nullptr;
  size_t total = dynamic_bytes;
  for (const StaticShared& s : module().shared) {
    const auto begin = reinterpret_cast<uintptr_t>(s.begin);
    shared_memory.push_back(std::make_unique<Region>(begin, begin + s.bytes, s.name, true));
    total += s.bytes;
  }
  if (total > kMostShared) {
    report("shared-size",
           text("the block needs %zu bytes of shared memory; no GPU gives it more than %zu", total, kMostShared));
    return false;
  }
  machine.dynamic = dynamic_memory;
  machine.dynamic_bytes = dynamic_bytes;
  const auto dynamic = reinterpret_cast<uintptr_t>(dynamic_memory);
  shared_memory.push_back(std::make_unique<Region>(dynamic, dynamic + dynamic_bytes, "dynamic memory", true));
  for (const auto& r : buffers) regions.push_back(r.get());
  for (const auto& r : shared_memory) regions.push_back(r.get());
  std::sort(regions.begin(), regions.end(), [](const Region* a, const Region* b) { return a->begin < b->begin; });
  return true;
}

void begin_block() {
  for (const auto& r : shared_memory) std::memset(reinterpret_cast<void*>(r->begin), 0xff, r->end - r->begin);  // NaN
}

void end_launch() { shared_memory.clear(); }

void thread_ends(Fiber& fiber) {
  if (fiber.copies.empty()) return;
  report("async",
         text("thread %d of block (%u, %u, %u) ends with %zu copies it never waited for", fiber.thread, machine.block.x,
              machine.block.y, machine.block.z, fiber.copies.size()),
         fiber.copies[0].pc);
}

void access(const void* memory, size_t bytes, Kind kind, const void* return_address, bool vector) {
  const auto p = reinterpret_cast<uintptr_t>(memory);
  ++counters.accesses;
  if (++machine.pass_accesses == kMostAccesses) {
    report("hang",
           text("%s made %llu accesses without ever waiting: does it wait for another thread?", running().c_str(),
                static_cast<unsigned long long>(kMostAccesses)),
           pc_of(return_address));
    fault();
  }
  if (!module().hooked) {  // AddressSanitizer looks at it
    if (find(p) == nullptr) return;
  } else if (kind == Kind::kRead && find(p) == nullptr && is_constant(module(), p)) {
    return;
  }
  const char* verb = kind == Kind::kRead ? "read" : kind == Kind::kWrite ? "write" : "atomic";
  const uint32_t pc = pc_of(return_address);
  Region* region = locate(p, bytes, verb, pc);
  if (region == nullptr || (vector && !aligned(p, bytes, verb, pc))) fault();
  if (module().hooked) check(*region, p, bytes, kind, pc);
  if (kind == Kind::kAtomic) {
    ++counters.atomics;
    if (!region->shared) synchronise(p);
  }
  const Path path = region->shared ? Path::kShared : kind == Kind::kRead ? Path::kGlobalLoad : Path::kGlobalStore;
  note(current->lane, pc, p, static_cast<uint32_t>(bytes), path);
}

void async_copy(char* shared, const char* global, uint32_t bytes, bool valid, const void* return_address) {
  const uint32_t pc = pc_of(return_address);
  const auto to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  ++counters.async_copies;
  if (!aligned(from, bytes, "cp.async", pc) || !aligned(to, bytes, "cp.async", pc)) fault();
  if (valid) {
    Region* source = locate(from, bytes, "cp.async", pc);
    if (source == nullptr) fault();
    if (source->shared) {
      report("async",
             text("cp.async by %s reads %s: its source is global memory", running().c_str(),
                  position(*source, from).c_str()),
             pc);
      fault();
    }
    if (module().hooked) check(*source, from, bytes, Kind::kRead, pc);
    note(current->lane, pc, from, bytes, Path::kGlobalLoad);
  }
  Region* target = locate(to, bytes, "cp.async", pc);
  if (target == nullptr) fault();
  if (!target->shared) {
    report("async",
           text("cp.async by %s writes %s: its destination is shared memory", running().c_str(),
                position(*target, to).c_str()),
           pc);
    fault();
  }
  if (module().hooked) check(*target, to, bytes, Kind::kWrite, pc, true);
  note(current->lane, pc, to, bytes, Path::kShared);
  current->copies.push_back({shared, global, bytes, pc, valid});
}

void async_commit() { current->groups.push_back(current->copies.size()); }

void async_wait(size_t groups) {
  Fiber& fiber = *current;
  if (fiber.groups.size() <= groups) return;
  const size_t finished = fiber.groups.size() - groups, count = fiber.groups[finished - 1];
  for (size_t i = 0; i < count; ++i) {
    const Copy& copy = fiber.copies[i];
    if (copy.valid) std::memcpy(copy.shared, copy.global, copy.bytes);
    else std::memset(copy.shared, 0, copy.bytes);
    if (!module().hooked) continue;
    const auto p = reinterpret_cast<uintptr_t>(copy.shared);
    Region* region = find(p);
    Cell* cell = region->cell(p);
    for (size_t done = 0; done < copy.bytes; done += size_t{1} << region->shift, ++cell)
      record_write(*cell, copy.pc, false, false);  // the data is there: written now, by this thread
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<std::ptrdiff_t>(count));
  fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + static_cast<std::ptrdiff_t>(finished));
  for (size_t& end : fiber.groups) end -= count;
}

bool read_row(Fiber& fiber, const void* row) {
  const auto p = reinterpret_cast<uintptr_t>(row);
  const uint32_t pc = fiber.wait.pc;
  Region* region = find(p);
  if (region == nullptr || p + 16 > region->end) {
    current = &fiber;
    report("ldmatrix", text("the row of %s reaches %s", running().c_str(), outside(p, 16).c_str()), pc);
    current = nullptr;
    return false;
  }
  if (!region->shared || p % 16 != 0) {
    report("ldmatrix",
           text("the row of thread %d, %s, is not %s", fiber.thread, position(*region, p).c_str(),
                region->shared ? "16-byte aligned" : "in shared memory"),
           pc);
    return false;
  }
  if (module().hooked) {
    current = &fiber;
    check(*region, p, 16, Kind::kRead, pc);
    current = nullptr;
  }
  return true;
}

}  // namespace vlmops::simt
