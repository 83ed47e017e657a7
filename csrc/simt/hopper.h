// Hopper's instructions: mbarrier, TMA, wgmma, and the order they make between threads.
//
// Threads that meet only at mbarriers are ordered by vector clocks: a thread's clock says which of the others' moments
// it comes after. Arriving hands the clock over, waiting takes in what has arrived. What TMA writes is written by the
// barrier the copy reports to: the thread numbers from kMostThreads on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "machine.h"
#include "shadow.h"

namespace vlmops::simt {

inline constexpr int kMostBarriers = 64;  // of a block

// Is what `thread` did at its moment `time` before what the running thread does now, by an mbarrier?
bool seen(int thread, uint32_t time);

// __syncwarp, __syncthreads: all of the threads [begin, end) know what each of them knows.
void join_clocks(int begin, int end);

void begin_hopper_block();
// No copy under way, no product forgotten.
void end_hopper_block();

// Lanes of the warp that wait for an mbarrier: continues those whose phase is complete. 1: some, 0: none, -1: nobody
// waits for one.
int wake(int warp);
// Nothing can run: lets copies arrive until a thread can. False: none can.
bool land();
// For a deadlock: who waits for which mbarrier, and what that misses; empty: nobody.
std::string waiting_for_barriers();

// Collectives of a warp, performed for it (collectives.cpp).
void issue_product(int warp);
void finish_products(int warp);

}  // namespace vlmops::simt
