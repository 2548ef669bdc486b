// Loops on the OpenMP team and with helpers (csrc/base/parallel.h), without torch. test_parallel.py builds and runs it,
// also with the thread sanitizer: `helpers` keeps to what that understands, `all` adds the team and fork().
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "base/helpers.h"

namespace {

using awq::Loop;

std::atomic<int64_t> checks{0};

#define CHECK(condition)                                                \
  do {                                                                  \
    ++checks;                                                           \
    if (!(condition)) {                                                 \
      std::printf("line %d: %s does not hold\n", __LINE__, #condition); \
      std::fflush(stdout);                                              \
      std::_Exit(1);                                                    \
    }                                                                   \
  } while (false)

void sleep_ms(int count) { std::this_thread::sleep_for(std::chrono::milliseconds(count)); }

template <class Body>
Loop loop_of(int64_t count, const Body& body) {
  return {[](const void* it, int64_t i, int thread) { (*static_cast<const Body*>(it))(i, thread); }, &body, count};
}

template <class Body>
void helped(int64_t count, int threads, const Body& body) {
  awq::run_with_helpers(loop_of(count, body), threads);
}

void team_or_helpers(const Loop& loop, int threads) { awq::run_parallel(loop, threads, awq::Threads::team_or_helpers); }

using Run = void (*)(const Loop&, int);

// Every index once, no number on two threads at one time, loops within a body on its thread alone. What bodies write
// without atomics is there when the loop has ended.
void check_loop(Run run, int64_t count, int threads) {
  std::vector<int> seen(static_cast<size_t>(count), 0);
  const auto busy = std::make_unique<std::atomic<int>[]>(static_cast<size_t>(threads));
  const auto body = [&](int64_t i, int thread) {
    CHECK(0 <= thread && thread < threads);
    CHECK(busy[static_cast<size_t>(thread)].fetch_add(1) == 0);
    CHECK(awq::in_parallel());
    const std::thread::id here = std::this_thread::get_id();
    int64_t expected = 0;
    awq::parallel_for(i % 4, threads, [&](int64_t j, int inner) {
      CHECK(j == expected++ && inner == 0 && std::this_thread::get_id() == here);
    });
    CHECK(expected == i % 4);
    ++seen[static_cast<size_t>(i)];
    CHECK(busy[static_cast<size_t>(thread)].fetch_sub(1) == 1);
  };
  run(loop_of(count, body), threads);
  for (int times : seen) CHECK(times == 1);
  CHECK(!awq::in_parallel());
}

void fuzz(Run run, unsigned seed, int loops) {
  std::mt19937 random(seed);
  for (int i = 0; i < loops; ++i) {
    const int64_t count = 2 + random() % (i % 8 == 0 ? 3000 : 12);
    check_loop(run, count, 2 + static_cast<int>(random() % 5));
  }
}

void fuzz_callers(Run run, int callers, int loops) {
  std::vector<std::thread> threads;
  for (int c = 0; c < callers; ++c) threads.emplace_back(fuzz, run, 100u + static_cast<unsigned>(c), loops);
  for (std::thread& thread : threads) thread.join();
}

// One caller and the only helper that two threads have are held in their bodies: another caller's loop must still end.
void nobody_waits_for_a_helper_that_has_not_begun() {
  std::atomic<int> held{0};
  std::atomic<bool> release{false};
  std::thread holder([&] {
    helped(2, 2, [&](int64_t, int) {
      ++held;
      while (!release) std::this_thread::yield();
    });
  });
  while (held < 2) std::this_thread::yield();
  std::atomic<int> done{0};
  helped(20, 2, [&](int64_t, int thread) {
    CHECK(thread == 0);
    ++done;
  });
  CHECK(done == 20);
  release = true;
  holder.join();
}

// A loop of 64 bodies, the last of which takes long. True if the team ran it.
bool team_runs_an_uneven_loop(int last_ms) {
  std::atomic<bool> team{true};
  const auto body = [&](int64_t i, int) {
    if (!omp_in_parallel()) team = false;
    if (i == 63) sleep_ms(last_ms);
  };
  team_or_helpers(loop_of(64, body), 2);
  return team;
}

void helpers_take_over_and_leave_again() {
  constexpr int kTries = 500;  // a loop that one thread has run alone tells nothing
  int tries = 0;
  while (team_runs_an_uneven_loop(30)) CHECK(++tries < kTries);
  for (tries = 0; !team_runs_an_uneven_loop(0); sleep_ms(50)) CHECK(++tries < kTries);
}

void a_forked_child_has_threads_too(Run used_before) {
  fuzz(used_before, 5, 20);
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // seconds
    fuzz(team_or_helpers, 6, 50);
    helped(64, 2, [&](int64_t, int) { sleep_ms(1); });
    std::_Exit(0);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
}

}  // namespace

int main(int, char** arguments) {
  nobody_waits_for_a_helper_that_has_not_begun();  // first: later there are more helpers than one
  fuzz(awq::run_with_helpers, 1, 600);
  fuzz_callers(awq::run_with_helpers, 4, 150);
  if (std::strcmp(arguments[1], "all") == 0) {
    fuzz(team_or_helpers, 2, 300);
    fuzz_callers(team_or_helpers, 4, 25);
    helpers_take_over_and_leave_again();
    a_forked_child_has_threads_too(awq::run_with_helpers);
    a_forked_child_has_threads_too(team_or_helpers);
  }
  std::printf("%lld checks\n", static_cast<long long>(checks.load()));
}
