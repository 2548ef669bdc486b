// The only place that uses several threads.
//
// Work is split over outputs, never over a sum, so results depend neither on the number of threads nor on which of them
// did what. The number comes from the caller, who asks torch (at::get_num_threads): one setting governs both.
//
// There are two supplies of threads. Usually the OpenMP team computes, which is torch's own. It is the fastest as long
// as every thread has a processor to itself: its threads spin for milliseconds before they sleep, and all of them must
// have passed a barrier before a region ends. Beside other work that is slow: everybody waits for a thread that is
// ready but does not run, and those who wait keep the processors that it could run on. So when the loops of short calls
// lose much time by that, helpers take over for a while. They sleep when there is nothing to do, and nobody waits for
// one that has not begun. They made quantize() slower
// by a third beside two busy processes, perhaps because torch's team goes on spinning between its operators, so the
// loops of quantize() keep to the team.
#pragma once

#include <cstdint>

namespace awq {

// One loop: call(body, index, thread) for every index in [0, count).
struct Loop {
  void (*call)(const void* body, int64_t index, int thread);
  const void* body;
  int64_t count;
};

// Whether this thread already runs the body of a loop, ours or another OpenMP region.
bool in_parallel();

enum class Threads { team, team_or_helpers };

// Runs a loop on at most `threads` threads (2 or more), the calling one among them.
void run_parallel(const Loop& loop, int threads, Threads supply);

// Calls body(index, thread) for every index in [0, count), in any order; thread < threads tells which scratch buffer to
// use: no two threads have the same number at one time. A loop within a body runs on its thread alone. body must not
// throw: an exception cannot leave the thread that it is raised in.
template <Threads supply = Threads::team, class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  if (threads <= 1 || count <= 1 || in_parallel()) {
    for (int64_t i = 0; i < count; ++i) body(i, 0);
    return;
  }
  const auto call = [](const void* it, int64_t index, int thread) { (*static_cast<const Body*>(it))(index, thread); };
  run_parallel({call, &body, count}, threads, supply);
}

}  // namespace awq
