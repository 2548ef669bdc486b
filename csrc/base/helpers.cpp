#include "base/helpers.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace awq {
namespace {

thread_local bool in_loop = false;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Waits for ready() without sleeping, but only for about as long as it takes to wake a thread.
template <class Ready>
void spin(const Ready& ready) {
  constexpr std::chrono::microseconds kSpin{20};
  const auto end = std::chrono::steady_clock::now() + kSpin;
  while (!ready() && std::chrono::steady_clock::now() < end) relax();
}

// A loop that is being run. It lives on the stack of its caller, who leaves only when nobody else knows of it: it is
// not in the list of open ones, and nobody is inside. All but `next` is written under the lock of the pool.
struct Job {
  const Loop& loop;
  std::atomic<int64_t> next{0};
  std::atomic<int> inside{0};  // helpers who have begun and not finished
  int places;                  // for helpers who have not begun
  int numbers = 0;             // given to helpers; the caller has number 0

  Job(const Loop& loop, int places) : loop(loop), places(places) {}

  // Relaxed: an index only has to be given out once. What bodies wrote is published by the lock.
  void work(int thread) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < loop.count;) loop.call(loop.body, i, thread);
  }
};

class Pool {
 public:
  void run(const Loop& loop, int helpers) {
    Job job(loop, helpers);
    {
      const std::lock_guard lock(mutex_);
      start(helpers);
      open_.push_back(&job);
      opened_count_.fetch_add(1, std::memory_order_relaxed);
    }
    for (int i = 0; i < helpers; ++i) opened_.notify_one();
    in_loop = true;
    job.work(0);
    in_loop = false;
    std::unique_lock lock(mutex_);
    close(&job);  // nobody enters any more
    lock.unlock();
    spin([&] { return job.inside.load(std::memory_order_relaxed) == 0; });
    lock.lock();
    // Now asleep: the processor is free for the helper if that was interrupted in a body.
    left_.wait(lock, [&] { return job.inside.load(std::memory_order_relaxed) == 0; });
  }

 private:
  // With fewer threads than wanted, or none, callers do more themselves.
  void start(int count) {
    if (started_ >= count) return;
    sigset_t all, before;  // signals are for the threads of the program: Python's main thread waits for them
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      for (; started_ < count; ++started_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void close(const Job* job) { open_.erase(std::remove(open_.begin(), open_.end(), job), open_.end()); }

  [[noreturn]] void help() {
    in_loop = true;
    std::unique_lock lock(mutex_);
    for (;;) {
      if (open_.empty()) {
        const int64_t seen = opened_count_.load(std::memory_order_relaxed);
        lock.unlock();
        spin([&] { return opened_count_.load(std::memory_order_relaxed) != seen; });
        lock.lock();
      }
      opened_.wait(lock, [&] { return !open_.empty(); });
      Job* job = open_.front();
      const int thread = ++job->numbers;
      job->inside.fetch_add(1, std::memory_order_relaxed);
      if (--job->places == 0) close(job);
      lock.unlock();
      job->work(thread);
      lock.lock();
      if (job->inside.fetch_sub(1, std::memory_order_relaxed) == 1) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable opened_, left_;
  std::vector<Job*> open_;  // with places left, the oldest first
  std::atomic<int64_t> opened_count_{0};
  int started_ = 0;
};

// Never destroyed: helpers sleep in it until the process ends. A child of fork() has none of the helpers, and perhaps a
// lock that one of them held, so it begins with a pool of its own.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};

[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] {
  pool = nullptr;
  forked = true;
});

Pool& the_pool() {
  Pool* found = pool.load();
  if (found != nullptr) return *found;
  Pool* made = new Pool;
  if (pool.compare_exchange_strong(found, made)) return *made;
  delete made;  // another thread was faster; nobody has seen this one
  return *found;
}

}  // namespace

void run_with_helpers(const Loop& loop, int threads) {
  the_pool().run(loop, static_cast<int>(std::min<int64_t>(threads, loop.count)) - 1);
}

bool in_helped_loop() { return in_loop; }

bool is_forked_child() { return forked.load(std::memory_order_relaxed); }

}  // namespace awq
