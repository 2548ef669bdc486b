#include "drivers/tile_probe.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/resource.h>
#endif

namespace awq {
namespace {

using Clock = std::chrono::steady_clock;

// Times that the system took the processor away from this thread.
long preemptions() {
#if defined(__linux__) && defined(RUSAGE_THREAD)
  rusage usage{};
  if (getrusage(RUSAGE_THREAD, &usage) == 0) return usage.ru_nivcsw;
#endif
  return 0;
}

// Spins, so that the thread loses the processor only when it is taken away.
void spin(void* until) {
  while (Clock::now() < *static_cast<Clock::time_point*>(until)) {
  }
}

}  // namespace

TileProbe probe_tiles(const KernelTable& table, int milliseconds) {
  TileProbe probe{};
  if (table.keep_tiles == nullptr) return probe;
  constexpr std::chrono::milliseconds kHold{8};  // a scheduler gives a thread about 3 ms where others wait
  std::atomic<bool> stop{false};
  std::vector<std::thread> others;
  for (unsigned i = 0; i < 2 * std::max(1u, std::thread::hardware_concurrency()); ++i)
    others.emplace_back([&stop] {
      while (!stop.load(std::memory_order_relaxed)) {
      }
    });
  for (const auto end = Clock::now() + std::chrono::milliseconds(milliseconds); Clock::now() < end; ++probe.holds) {
    const long before = preemptions();
    Clock::time_point until = Clock::now() + kHold;
    probe.damaged += table.keep_tiles(spin, &until) ? 0 : 1;
    probe.preempted += preemptions() > before ? 1 : 0;
  }
  stop.store(true, std::memory_order_relaxed);
  for (std::thread& other : others) other.join();
  return probe;
}

}  // namespace awq
