// Scheduling: which thread runs when. Blocks run one after another; a warp runs until all its lanes wait at one
// collective, which is then performed for all of them; a block-wide barrier opens when every warp has come to it.
#include "machine.h"

#include <algorithm>
#include <cstring>

#include "hopper.h"
#include "memory.h"
#include "module.h"
#include "reports.h"

namespace vlmops::simt {

Machine machine;
Fiber* current;

namespace {

const char* name_of(Op op) {
  switch (op) {
    case Op::kNone: return "nothing";
    case Op::kDone: return "the end";
    case Op::kBlock: return "__syncthreads";
    case Op::kWarp: return "__syncwarp";
    case Op::kShuffle: return "a shuffle";
    case Op::kBallot: return "a ballot";
    case Op::kLdmatrix: return "ldmatrix";
    case Op::kMma: return "mma";
    case Op::kBarrier: return "an mbarrier";
    case Op::kProduct: return "wgmma";
    case Op::kProductWait: return "wgmma.wait_group";
  }
  return "?";
}

std::string place(const Fiber& fiber) {
  std::string where = name_of(fiber.wait.op);
  if (fiber.wait.file != nullptr) {
    const char* slash = std::strrchr(fiber.wait.file, '/');
    where += text(" (%s:%d)", slash != nullptr ? slash + 1 : fiber.wait.file, fiber.wait.line);
  }
  return where;
}

std::string this_block() { return text("block (%u, %u, %u)", machine.block.x, machine.block.y, machine.block.z); }

// Continues the next thread of the warp's pass, or the scheduler.
void leave(Fiber& fiber, bool last) {
  machine.pass_accesses = 0;
  if (machine.pass_next < machine.pass_size && !machine.aborted) {
    Fiber& next = machine.fibers[machine.pass[machine.pass_next++]];
    current = &next;
    ++counters.switches;
    switch_context(fiber.context, next.context, last);
  } else {
    current = nullptr;
    switch_context(fiber.context, machine.main, last);
  }
  current = &fiber;
}

void fiber_main() {
  entered(machine.main);
  machine.trampoline(machine.args);
  Fiber& fiber = *current;
  thread_ends(fiber);
  fiber.wait = Wait{Op::kDone};
  leave(fiber, true);
  __builtin_unreachable();
}

void run_pass(int warp) {
  machine.pass_size = machine.pass_next = 0;
  const int begin = warp * kLanes, end = std::min(begin + kLanes, machine.threads);
  for (int t = begin; t < end; ++t)
    if (machine.fibers[t].wait.op == Op::kNone) machine.pass[machine.pass_size++] = t;
  if (machine.schedule == Schedule::kReverse) std::reverse(machine.pass, machine.pass + machine.pass_size);
  if (machine.schedule == Schedule::kSeeded)
    std::shuffle(machine.pass, machine.pass + machine.pass_size, machine.random);
  if (machine.pass_size == 0) return;
  Fiber& first = machine.fibers[machine.pass[machine.pass_next++]];
  current = &first;
  ++counters.switches;
  switch_context(machine.main, first.context, false);
  current = nullptr;
  flush_requests();
}

// All lanes wait: at the same thing?
bool agree(int warp) {
  const int begin = warp * kLanes, end = std::min(begin + kLanes, machine.threads);
  const Fiber& first = machine.fibers[begin];
  for (int t = begin + 1; t < end; ++t) {
    const Fiber& other = machine.fibers[t];
    const bool same = other.wait.op == first.wait.op && other.wait.line == first.wait.line &&
                      (other.wait.file == first.wait.file || std::strcmp(other.wait.file, first.wait.file) == 0);
    if (same) continue;
    const bool barrier_after_exit = (first.wait.op == Op::kBlock && other.wait.op == Op::kDone) ||
                                    (first.wait.op == Op::kDone && other.wait.op == Op::kBlock);
    report(barrier_after_exit ? "deadlock" : "divergence",
           text("in warp %d of %s thread %d is at %s, thread %d at %s", warp, this_block().c_str(), first.thread,
                place(first).c_str(), other.thread, place(other).c_str()),
           first.wait.pc, "", other.wait.pc);
    return false;
  }
  if (first.wait.op != Op::kDone && first.wait.op != Op::kBlock && end - begin < kLanes) {
    report("divergence",
           text("warp %d has %d lanes only at %s, which is for full warps", warp, end - begin, place(first).c_str()),
           first.wait.pc);
    return false;
  }
  return true;
}

// Runs a warp: to its next collective in the seeded schedule, else to its barrier or end.
bool advance(int warp) {
  const int begin = warp * kLanes, end = std::min(begin + kLanes, machine.threads);
  do {
    run_pass(warp);
    if (machine.aborted) return false;
    const int woken = wake(warp);
    if (woken == 0) return true;  // some lanes wait for an mbarrier
    if (woken > 0) continue;
    if (!agree(warp)) return false;
    const Op op = machine.fibers[begin].wait.op;
    if (op == Op::kBlock || op == Op::kDone) return true;
    perform(warp, op);
    if (machine.aborted) return false;
    for (int t = begin; t < end; ++t) machine.fibers[t].wait.op = Op::kNone;
  } while (machine.schedule != Schedule::kSeeded);
  return true;
}

bool ready(int warp) {
  const int begin = warp * kLanes, end = std::min(begin + kLanes, machine.threads);
  for (int t = begin; t < end; ++t)  // one lane may wait for an mbarrier while the others go on
    if (machine.fibers[t].wait.op == Op::kNone) return true;
  return false;
}

// Threads that another one's arrival, or a copy's, lets go on.
bool wake_any() {
  bool any = false;
  for (int w = 0; w < machine.warps; ++w) any = wake(w) > 0 || any;
  return any;
}

// Every warp is at a barrier or at its end: opens the barrier. 1: go on, 0: the block is done, -1: a bug.
int open_barrier() {
  const Fiber* waiting = nullptr;
  const Fiber* gone = nullptr;
  for (int w = 0; w < machine.warps; ++w) {
    const Fiber& fiber = machine.fibers[w * kLanes];
    if (fiber.wait.op == Op::kDone) {
      gone = &fiber;
    } else if (waiting == nullptr) {
      waiting = &fiber;
    } else if (fiber.wait.line != waiting->wait.line || std::strcmp(fiber.wait.file, waiting->wait.file) != 0) {
      report("deadlock",
             text("in %s thread %d is at %s, thread %d at %s", this_block().c_str(), waiting->thread,
                  place(*waiting).c_str(), fiber.thread, place(fiber).c_str()),
             waiting->wait.pc, "", fiber.wait.pc);
      return -1;
    }
  }
  if (waiting == nullptr) return 0;
  if (gone != nullptr) {
    report("deadlock",
           text("in %s thread %d waits at %s, thread %d has ended", this_block().c_str(), waiting->thread,
                place(*waiting).c_str(), gone->thread),
           waiting->wait.pc);
    return -1;
  }
  ++machine.epoch;
  join_clocks(0, machine.threads);
  for (int w = 0; w < machine.warps; ++w) ++machine.warp_epoch[w];
  ++counters.barriers;
  for (int t = 0; t < machine.threads; ++t) machine.fibers[t].wait.op = Op::kNone;
  return 1;
}

bool run_block(Index block) {
  machine.block = block;
  machine.block_epoch = ++machine.epoch;
  machine.blocks.emplace_back(machine.epoch, block);
  machine.acquired.clear();
  begin_block();
  begin_hopper_block();
  const Index size = machine.block_size;
  for (int t = 0; t < machine.threads; ++t) {
    Fiber& fiber = machine.fibers[t];
    const auto u = static_cast<unsigned>(t);
    fiber.index = {u % size.x, u / size.x % size.y, u / size.x / size.y};
    fiber.thread = t;
    fiber.lane = t % kLanes;
    fiber.warp = t / kLanes;
    fiber.wait = Wait{};
    fiber.copies.clear();
    fiber.groups.clear();
    fiber.fence_epoch = 0;
    fiber.time = 1;
    fiber.proxy_time = 0;
    fiber.clock.clear();
    prepare(fiber.context, static_cast<size_t>(t), fiber_main);
  }
  std::vector<int> order(static_cast<size_t>(machine.warps));
  for (int w = 0; w < machine.warps; ++w) order[w] = w;
  if (machine.schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  while (true) {
    for (bool any = true; any;) {
      any = false;
      if (machine.schedule == Schedule::kSeeded) std::shuffle(order.begin(), order.end(), machine.random);
      for (const int w : order) {
        if (!ready(w)) continue;
        if (!advance(w)) return false;
        any = any || ready(w);
      }
    }
    if (machine.aborted) return false;
    if (wake_any() || land()) continue;
    if (const std::string who = waiting_for_barriers(); !who.empty()) {
      report("deadlock", text("in %s %s", this_block().c_str(), who.c_str()));
      return false;
    }
    const int next = open_barrier();
    if (next == 0) end_hopper_block();
    if (next <= 0) return next == 0;
  }
}

}  // namespace

void wait_for(const Wait& wait) {
  Fiber& fiber = *current;
  fiber.wait = wait;
  leave(fiber, false);
}

void fault() {
  machine.aborted = true;
  leave(*current, true);
  __builtin_unreachable();
}

void run(void (*trampoline)(void**), void** args, Index grid, Index block, size_t dynamic_bytes, Schedule schedule,
         uint64_t seed) {
  machine.trampoline = trampoline;
  machine.args = args;
  machine.grid = grid;
  machine.block_size = block;
  machine.threads = static_cast<int>(block.x * block.y * block.z);
  machine.warps = (machine.threads + kLanes - 1) / kLanes;
  machine.schedule = schedule;
  machine.random.seed(static_cast<std::mt19937::result_type>(seed));
  machine.aborted = false;
  machine.pass_accesses = 0;
  machine.main.stack = nullptr;  // another host thread may be calling
  if (machine.fibers.size() < static_cast<size_t>(machine.threads)) machine.fibers.resize(machine.threads);
  machine.launch_epoch = machine.epoch + 1;
  machine.blocks.clear();
  if (!begin_launch(dynamic_bytes)) return;

  std::vector<Index> order;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) order.push_back({x, y, z});
  if (schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (schedule == Schedule::kSeeded) std::shuffle(order.begin(), order.end(), machine.random);
  for (const Index& index : order)
    if (!run_block(index)) break;
  end_launch();
}

}  // namespace vlmops::simt

using vlmops::simt::current;
using vlmops::simt::machine;

vlmops::simt::Index vlmops_simt_thread_index() { return current->index; }
vlmops::simt::Index vlmops_simt_block_index() { return machine.block; }
vlmops::simt::Index vlmops_simt_block_size() { return machine.block_size; }
vlmops::simt::Index vlmops_simt_grid_size() { return machine.grid; }
int vlmops_simt_lane() { return current->lane; }
void* vlmops_simt_dynamic_shared() { return machine.dynamic; }
