#include "base/parallel.h"

#include <omp.h>

#include <atomic>
#include <chrono>

#include "base/helpers.h"

namespace awq {
namespace {

// All times in nanoseconds. A thread that does not run waits for the end of another's time slice, one to a few
// milliseconds. On a quiet machine even the last thread of a team is awake after a tenth of that.
constexpr int64_t kLate = 300'000;
// By how many bodies of average length one thread may be done before the last one.
constexpr int64_t kUneven = 4;
// Helpers take over when this much is lost to late threads within a window. Where less is lost the team is faster: its
// threads need not be woken, and those that still spin after an operator of torch do not stand in the way of helpers.
constexpr int64_t kWindow = 40'000'000, kMuch = 20'000'000;
// For how long. To try the team again costs about kMuch if the machine is still shared.
constexpr int64_t kHelpersFor = 500'000'000;

// The thread sanitizer sees races where there are none with libgomp, which is not built for it: it gets helpers only.
#if defined(__SANITIZE_THREAD__)
constexpr bool kHasTeam = false;
#else
constexpr bool kHasTeam = true;
#endif

int64_t now() { return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1); }

// Callers may overwrite what another has just noted here; a switch then comes a little earlier or later.
std::atomic<int64_t> helpers_until{0}, window_begin{0}, lost{0};

// Runs a loop on the OpenMP team. The time lost if it ended late, long after a thread found nothing left to do; else 0.
int64_t run_with_team(const Loop& loop, int threads) {
  std::atomic<int64_t> next{0}, first_done{0};
  int64_t mean = 0;  // time of a body, on the thread that was done first
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    const int64_t begin = now();
    int64_t done = 0;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < loop.count; ++done)
      loop.call(loop.body, i, thread);
    int64_t nobody = 0;
    const int64_t end = now();
    if (done > 0 && first_done.compare_exchange_strong(nobody, end)) mean = (end - begin) / done;
  }
  const int64_t waited = now() - first_done.load() - kUneven * mean;
  return waited > kLate ? waited : 0;
}

void note_late(int64_t waited) {
  const int64_t time = now();
  if (time - window_begin.load(std::memory_order_relaxed) > kWindow) {
    window_begin.store(time - waited, std::memory_order_relaxed);
    lost.store(0, std::memory_order_relaxed);
  }
  if (lost.fetch_add(waited, std::memory_order_relaxed) + waited > kMuch)
    helpers_until.store(time + kHelpersFor, std::memory_order_relaxed);
}

// Where threads are bound to processors, the team has its places, and helpers would all have the place of the caller.
bool may_have_helpers() { return omp_get_proc_bind() == omp_proc_bind_false; }

}  // namespace

bool in_parallel() { return in_helped_loop() || omp_in_parallel(); }

void run_parallel(const Loop& loop, int threads, Threads supply) {
  // In a child of fork() the team is gone, but OpenMP does not know that and would wait for it.
  if (!kHasTeam || is_forked_child()) return run_with_helpers(loop, threads);
  if (supply == Threads::team_or_helpers && now() < helpers_until.load(std::memory_order_relaxed) && may_have_helpers())
    return run_with_helpers(loop, threads);
  const int64_t waited = run_with_team(loop, threads);
  if (supply == Threads::team_or_helpers && waited > 0) note_late(waited);
}

}  // namespace awq
