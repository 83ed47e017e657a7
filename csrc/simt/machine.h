// The machine's state. Private to csrc/simt.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "fiber.h"

namespace vlmops::simt {

inline constexpr int kLanes = 32;
inline constexpr int kMostThreads = 1024;

enum class Op : uint8_t {
  kNone,
  kDone,
  kBlock,
  kWarp,
  kShuffle,
  kBallot,
  kLdmatrix,
  kMma,
  kBarrier,
  kProduct,
  kProductWait
};

// What a thread waits for.
struct Wait {
  Op op = Op::kNone;
  const char* file = nullptr;
  int line = 0;
  uint32_t pc = 0;
  void* args = nullptr;
};

struct Copy {  // one cp.async
  char* shared;
  const char* global;
  uint32_t bytes, pc;
  bool valid;
};

struct Fiber {
  Context context;
  Index index;
  int thread, lane, warp;
  Wait wait;                   // op != kNone: waiting
  std::vector<Copy> copies;    // in flight, oldest first
  std::vector<size_t> groups;  // ends of the committed groups in `copies`
  uint32_t fence_epoch = 0;    // of the last device-wide fence
  // hopper.cpp: this thread's moment, what it knows of others', its last fence.proxy.async
  uint32_t time = 1;
  uint32_t proxy_time = 0;
  std::vector<uint32_t> clock;
};

enum class Schedule : int { kForward = 0, kReverse = 1, kSeeded = 2 };

// What an atomic published after a fence: all the block wrote before its last barrier, and the thread's own writes.
struct Release {
  uint32_t first, epoch;
  int thread;
};

struct Machine {
  // of the launch
  void (*trampoline)(void**) = nullptr;
  void** args = nullptr;
  Index grid{}, block_size{};
  int threads = 0, warps = 0;
  Schedule schedule = Schedule::kForward;
  std::mt19937 random;
  bool aborted = false;  // a fault: the launch is given up, as a GPU does

  // of the block that runs
  Index block{};
  std::vector<Fiber> fibers;
  uint32_t epoch = 0;         // one more at every barrier and every block, over all launches
  uint32_t launch_epoch = 0;  // first of the launch
  uint32_t block_epoch = 0;   // first of the block
  uint32_t warp_epoch[kMostThreads / kLanes] = {};
  std::vector<Release> acquired;                   // by this block, from earlier ones
  std::vector<std::pair<uint32_t, Index>> blocks;  // first epochs of this launch's blocks, for reports
  char* dynamic = nullptr;
  size_t dynamic_bytes = 0;

  // of the warp that runs
  int pass[kLanes] = {};  // threads still to run until they wait
  int pass_size = 0, pass_next = 0;
  uint64_t pass_accesses = 0;  // of the running thread since it last waited
  Context main;
};

extern Machine machine;
extern Fiber* current;  // the running thread, or null outside kernels

// In a fiber: give the processor away until the collective has happened.
void wait_for(const Wait& wait);
// In a fiber: give the launch up.
[[noreturn]] void fault();

void run(void (*trampoline)(void**), void** args, Index grid, Index block, size_t dynamic_bytes, Schedule schedule,
         uint64_t seed);

// collectives.cpp: performs the collective all lanes of a warp wait at.
void perform(int warp, Op op);

}  // namespace vlmops::simt
