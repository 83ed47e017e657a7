#include "checks.h"

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "hopper.h"
#include "reports.h"

namespace vlmops::simt {

namespace {

std::unordered_map<uintptr_t, std::vector<Release>> releases;  // by the address of the atomic

Index block_of(uint32_t epoch) {
  auto after = std::upper_bound(machine.blocks.begin(), machine.blocks.end(), epoch,
                                [](uint32_t e, const auto& block) { return e < block.first; });
  return after == machine.blocks.begin() ? Index{} : (after - 1)->second;
}

std::string thread_of(int thread, uint32_t epoch) {
  if (thread >= kMostThreads) return "TMA";
  const Index b = block_of(epoch);
  return text("thread %d of block (%u, %u, %u)", thread, b.x, b.y, b.z);
}

// By an atomic of that block after a fence, and an atomic of this block on the same address?
bool acquired(uint32_t epoch, int thread) {
  for (const Release& r : machine.acquired)
    if (epoch >= r.first && (epoch < r.epoch || (epoch == r.epoch && thread == r.thread))) return true;
  return false;
}

bool unordered(const Access& a, bool shared) {
  if (a.epoch < machine.launch_epoch) return false;
  if (a.epoch < machine.block_epoch) return !shared && !acquired(a.epoch, a.thread);
  if (a.thread >= kMostThreads && a.thread != kNobody)
    return !seen(a.thread, a.time);  // a barrier of threads waits for no copy
  if (a.epoch != machine.epoch || a.thread == current->thread || seen(a.thread, a.time)) return false;
  return a.thread / kLanes != current->warp || a.warp_epoch == machine.warp_epoch[current->warp];
}

void race(const Region& region, uintptr_t p, const char* what, uint32_t pc, const char* before, int thread,
          uint32_t epoch, uint32_t before_pc) {
  report("race", text("%s of %s by %s", what, position(region, p).c_str(), running().c_str()), pc,
         text("not ordered after the %s by %s", before, thread_of(thread, epoch).c_str()), before_pc);
}

// Why the destination of a copy may not be touched yet.
std::string copy_state(const Cell& cell, uintptr_t p) {
  if (cell.write.thread >= kMostThreads) return "its TMA copy has not arrived";
  const Fiber& fiber = machine.fibers[cell.write.thread];
  const size_t committed = fiber.groups.empty() ? 0 : fiber.groups.back();
  for (size_t i = 0; i < fiber.copies.size(); ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(fiber.copies[i].shared);
    if (p < begin || p >= begin + fiber.copies[i].bytes) continue;
    return text("its cp.async by thread %d %s", fiber.thread,
                i < committed ? "has not been waited for" : "was never committed to a group");
  }
  return "its cp.async has not been waited for";
}

bool check_known(const Region& region, const Cell& cell, uintptr_t p, uint32_t pc) {
  if (region.shared ? cell.write.epoch >= machine.block_epoch : cell.initialised) return true;
  report("uninitialised", text("read of %s, never written, by %s", position(region, p).c_str(), running().c_str()), pc);
  return false;
}

void check_read(const Region& region, const Cell& cell, uintptr_t p, uint32_t pc) {
  if (!check_known(region, cell, p, pc)) return;
  if (cell.in_flight && cell.write.epoch >= machine.block_epoch) {
    report("async",
           text("read of %s by %s: %s", position(region, p).c_str(), running().c_str(), copy_state(cell, p).c_str()),
           pc, "started", cell.write.pc);
  } else if (cell.write.thread >= kMostThreads && unordered(cell.write, region.shared)) {
    report("async",
           text("read of %s by %s, which has not waited for the mbarrier of its TMA copy", position(region, p).c_str(),
                running().c_str()),
           pc, "started", cell.write.pc);
  } else if (unordered(cell.write, region.shared)) {
    race(region, p, "read", pc, "write", cell.write.thread, cell.write.epoch, cell.write.pc);
  }
}

void check_write(const Region& region, const Cell& cell, uintptr_t p, uint32_t pc, bool atomic) {
  if (cell.in_flight && cell.write.epoch >= machine.block_epoch) {
    report("async",
           text("write of %s by %s: %s", position(region, p).c_str(), running().c_str(), copy_state(cell, p).c_str()),
           pc, "started", cell.write.pc);
    return;
  }
  if (unordered(cell.write, region.shared) && !(atomic && cell.write.other == 1))
    race(region, p, "write", pc, "write", cell.write.thread, cell.write.epoch, cell.write.pc);
  const Access& read = cell.read;
  if (read.epoch == machine.epoch) {
    const int me = current->thread;
    if (unordered(read, region.shared)) race(region, p, "write", pc, "read", read.thread, read.epoch, read.pc);
    else if (read.other != kNobody && read.other != me && read.warp_epoch == machine.warp_epoch[current->warp])
      race(region, p, "write", pc, "read", read.other, read.epoch, read.pc);
    else if (cell.second_thread != kNobody && cell.second_thread / kLanes != current->warp &&
             !seen(cell.second_thread, cell.second_time))
      race(region, p, "write", pc, "read", cell.second_thread, read.epoch, cell.second_pc);
  }
  if (region.shared) return;
  if (read.epoch < machine.block_epoch && unordered(read, false))
    race(region, p, "write", pc, "read", read.thread, read.epoch, read.pc);
  else if (cell.earlier_block >= machine.launch_epoch && !acquired(cell.earlier_block, kNobody))
    report("race", text("write of %s by %s", position(region, p).c_str(), running().c_str()), pc,
           text("not ordered after a read by a thread of block (%u, %u, %u)", block_of(cell.earlier_block).x,
                block_of(cell.earlier_block).y, block_of(cell.earlier_block).z));
}

void record_read(Cell& cell, uint32_t pc) {
  Access& read = cell.read;
  const auto me = static_cast<uint16_t>(current->thread);
  const uint32_t warp_epoch = machine.warp_epoch[current->warp];
  if (read.epoch != machine.epoch) {
    if (read.epoch < machine.block_epoch && read.epoch >= machine.launch_epoch) cell.earlier_block = read.epoch;
    read = {machine.epoch, warp_epoch, pc, current->time, me, kNobody};
    cell.second_thread = kNobody;
  } else if (read.thread / kLanes != current->warp) {
    if (cell.second_thread == kNobody || cell.second_thread == me) {
      cell.second_thread = me;
      cell.second_time = current->time;
      cell.second_pc = pc;
    }
  } else if (read.warp_epoch != warp_epoch) {
    read.warp_epoch = warp_epoch;
    read.pc = pc;
    read.time = current->time;
    read.thread = me;
    read.other = kNobody;
  } else if (read.thread != me) {
    read.other = me;
  } else {
    read.time = current->time;
  }
}

}  // namespace

std::string running() { return thread_of(current->thread, machine.epoch); }

std::string position(const Region& region, uintptr_t p) {
  return text("%s%s+%zu", region.shared ? "shared " : "", region.name.c_str(), static_cast<size_t>(p - region.begin));
}

void synchronise(uintptr_t p) {
  std::vector<Release>& published = releases[p];
  machine.acquired.insert(machine.acquired.end(), published.begin(), published.end());
  if (current->fence_epoch == machine.epoch) published.push_back({machine.block_epoch, machine.epoch, current->thread});
}

void forget_releases() { releases.clear(); }

void record_write(Cell& cell, uint32_t pc, bool atomic, bool in_flight) {
  cell.write = {machine.epoch, machine.warp_epoch[current->warp],      pc,
                current->time, static_cast<uint16_t>(current->thread), static_cast<uint16_t>(atomic ? 1 : 0)};
  cell.initialised = true;
  cell.in_flight = in_flight;
}

void check_tile(Region& region, uintptr_t p, size_t bytes, uint32_t pc, bool finished) {
  region.refine(p, bytes);
  Cell* cell = region.cell(p);
  for (size_t done = 0; done < bytes; done += size_t{1} << region.shift, ++cell) {
    check_read(region, *cell, p + done, pc);
    const Access& write = cell->write;
    if (write.thread < kMostThreads && write.epoch >= machine.block_epoch &&
        machine.fibers[write.thread].proxy_time <= write.time && !cell->in_flight) {
      report("proxy",
             text("%s, written by thread %d without fence.proxy.async, is read by a matrix instruction",
                  position(region, p + done).c_str(), write.thread),
             pc, "written", write.pc);
    }
    if (finished) record_read(*cell, pc);
  }
}

void check(Region& region, uintptr_t p, size_t bytes, Kind kind, uint32_t pc, bool in_flight) {
  region.refine(p, bytes);
  const size_t granule = size_t{1} << region.shift;
  uint64_t fresh = 0;
  Cell* cell = region.cell(p);
  for (size_t done = 0; done < bytes; done += granule, ++cell) {
    if (kind == Kind::kRead) {
      if (cell->read.epoch < machine.launch_epoch) fresh += granule;
      check_read(region, *cell, p + done, pc);
      record_read(*cell, pc);
    } else {
      if (cell->write.epoch < machine.launch_epoch) fresh += granule;
      if (kind == Kind::kAtomic) check_known(region, *cell, p + done, pc);
      check_write(region, *cell, p + done, pc, kind == Kind::kAtomic);
      record_write(*cell, pc, kind == Kind::kAtomic, in_flight);
    }
  }
  if (region.shared) return;
  (kind == Kind::kRead ? counters.global_load_unique_bytes : counters.global_store_unique_bytes) += fresh;
}

}  // namespace vlmops::simt
