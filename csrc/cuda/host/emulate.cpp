// Threads of a block as fibers; see host/device.h.
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/device.h"
#include "cuda/host/block.h"

#if defined(__x86_64__)
// Saves what a function must keep on this stack, whose top goes to *from, and takes up another one.
extern "C" void awq_emulated_switch(void** from, void* to);
asm(R"(
.text
.type awq_emulated_switch, @function
awq_emulated_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size awq_emulated_switch, . - awq_emulated_switch
)");
#endif

namespace awq::cuda {

Index current_thread, current_block, size_of_block, size_of_grid;

namespace {

constexpr size_t kStack = 64 * 1024;

#if defined(__x86_64__)
// swapcontext would do as well, but calls the system each time: a hundred times slower.
class Context {
 public:
  void prepare(unsigned char* stack, void (*start)()) {
    void** top = reinterpret_cast<void**>(stack + kStack - 8);
    top[0] = nullptr;  // where `start`, which never returns, would return to; its stack is aligned as after a call
    top[-1] = reinterpret_cast<void*>(start);
    for (int i = 2; i < 8; ++i) top[-i] = nullptr;  // six registers
    top_ = top - 7;
  }
  void leave_for(Context& other) { awq_emulated_switch(&top_, other.top_); }

 private:
  void* top_ = nullptr;
};
#else
class Context {
 public:
  void prepare(unsigned char* stack, void (*start)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, start, 0);
  }
  void leave_for(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};
#endif
constexpr int64_t kMostShared = 227 * 1024, kGuard = 64;
constexpr unsigned char kFill = 0xff;  // a NaN in every float type
constexpr int kMostThreads = 1024;

enum class State { ready, at_block, at_warp, at_lanes, at_condition, done };

struct Copy {
  void* to;
  const void* from;
  int bytes;

  void perform() const {
    std::memset(to, 0, 16);
    if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
  }
};

struct Fiber {
  Context context;
  State state;
  bool (*met)(const void*);  // what it waits for at_condition, and of what
  const void* of;
  int exchanges;                           // so far: odd and even ones have slots of their own
  std::vector<Copy> open;                  // not committed yet
  std::vector<std::vector<Copy>> commits;  // the oldest first
};

struct Device {
  Fiber fibers[kMostThreads];
  unsigned char* stacks;
  Context scheduler;
  Fiber* running = nullptr;
  alignas(16) unsigned char shared[kMostShared + kGuard];
  unsigned char lanes[2][kMostThreads / kWarp][kWarp * kLaneBytes];
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  int64_t shared_bytes = 0;  // of the block that runs

  Device() {
    void* memory =
        mmap(nullptr, (kStack + 192) * kMostThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stacks = static_cast<unsigned char*>(memory);
  }
};

Device& device() {
  static const auto made = std::make_unique<Device>();
  return *made;
}

void wait(State state) {
  Fiber& fiber = *device().running;
  fiber.state = state;
  fiber.context.leave_for(device().scheduler);
}

void start() {
  Device& d = device();
  d.body(d.context);
  d.running->state = State::done;
  d.running->context.leave_for(d.scheduler);
}

// Lets the threads first .. first + count go on if all of them wait in `state`. Returns whether they do.
bool release(int first, int count, State state) {
  Device& d = device();
  for (int i = first; i < first + count; ++i)
    if (d.fibers[i].state != state) return false;
  for (int i = first; i < first + count; ++i) d.fibers[i].state = State::ready;
  return true;
}

// Lets the threads go on whose conditions have come true. Returns whether there are any.
bool release_met(int threads) {
  bool moved = false;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = device().fibers[i];
    if (fiber.state != State::at_condition || !fiber.met(fiber.of)) continue;
    fiber.state = State::ready;
    moved = true;
  }
  return moved;
}

// Runs those of the threads first .. first + count that are ready. Returns whether there were any.
bool run_ready(int first, int count, bool descending) {
  Device& d = device();
  bool ran = false;
  for (int n = 0; n < count; ++n) {
    const int i = first + (descending ? count - 1 - n : n);
    if (d.fibers[i].state != State::ready) continue;
    d.running = &d.fibers[i];
    current_thread.x = static_cast<unsigned>(i);
    d.scheduler.leave_for(d.fibers[i].context);
    ran = true;
  }
  return ran;
}

enum class Order { ascending, descending, lowest, highest };

// Runs all threads that are ready; or one warp, the first of the order that can run, which so gets ahead of the others.
bool run_some(int threads, Order order) {
  const bool descending = order == Order::descending || order == Order::highest;
  if (order == Order::ascending || order == Order::descending) return run_ready(0, threads, descending);
  for (int n = 0; n < threads; n += kWarp)
    if (run_ready(descending ? threads - kWarp - n : n, kWarp, descending)) return true;
  return false;
}

Order asked_order() {
  const char* asked = std::getenv("AWQ_EMULATED_ORDER");
  constexpr const char* kNames[] = {"ascending", "descending", "lowest", "highest"};
  for (int i = 0; i < 4; ++i)
    if (asked == nullptr || std::strcmp(asked, kNames[i]) == 0) return static_cast<Order>(i);
  fail("AWQ_EMULATED_ORDER is none of ascending, descending, lowest, highest");
}

void run_block(int threads, int64_t shared, Order order) {
  Device& d = device();
  std::memset(d.shared, kFill, static_cast<size_t>(shared + kGuard));
  d.shared_bytes = shared;
  begin_block();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = d.fibers[i];
    fiber.state = State::ready;
    fiber.exchanges = 0;
    // Shifted, so that the ends of the stacks are not all in the same lines of the cache.
    fiber.context.prepare(d.stacks + static_cast<size_t>(i) * (kStack + 192), start);
  }
  for (int done = 0; done < threads;) {
    bool moved = run_some(threads, order);
    moved |= release(0, threads, State::at_block);
    for (int first = 0; first < threads; first += kWarp)
      moved |= release(first, kWarp, State::at_warp) || release(first, kWarp, State::at_lanes);
    moved |= release_met(threads);
    done = 0;
    for (int i = 0; i < threads; ++i) done += d.fibers[i].state == State::done;
    if (!moved && done < threads && !finish_copy()) fail("some threads wait at a barrier that others do not reach");
  }
  for (int64_t i = shared; i < shared + kGuard; ++i)
    if (d.shared[i] != kFill) fail("a write behind shared memory");
  for (int i = 0; i < threads; ++i)
    if (!d.fibers[i].open.empty() || !d.fibers[i].commits.empty()) fail("copies that nobody waited for");
  end_block(threads);
}

}  // namespace

void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: block (%u, %u, %u): %s\n", current_block.x, current_block.y, current_block.z,
               what);
  std::abort();
}

void wait_for(bool (*met)(const void*), const void* of) {
  if (met(of)) return;
  device().running->met = met;
  device().running->of = of;
  wait(State::at_condition);
}

void give_way() { wait(State::ready); }

int64_t shared_size() { return device().shared_bytes; }
int64_t shared_limit() { return kMostShared; }
unsigned char* shared_memory() { return device().shared; }
void sync_block() { wait(State::at_block); }
void sync_warp() { wait(State::at_warp); }

const unsigned char* exchange(const void* mine, int size) {
  Fiber& fiber = *device().running;
  const unsigned thread = current_thread.x;
  unsigned char* lanes = device().lanes[fiber.exchanges++ % 2][thread / kWarp];
  std::memcpy(lanes + thread % kWarp * kLaneBytes, mine, static_cast<size_t>(size));
  wait(State::at_lanes);
  return lanes;
}

void copy16(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) fail("copy16 to an address that is not a multiple of 16");
  if (bytes != 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0) fail("copy16 from an address not a multiple of 16");
  if (bytes < 0 || bytes > 16) fail("copy16 of more than 16 bytes");
  const Copy copy{to, from, bytes};
  early_copies() ? copy.perform() : device().running->open.push_back(copy);
}

void commit_copies() {
  Fiber& fiber = *device().running;
  fiber.commits.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_until_open(int open) {
  Fiber& fiber = *device().running;
  while (static_cast<int>(fiber.commits.size()) > open) {
    for (const Copy& copy : fiber.commits.front()) copy.perform();
    fiber.commits.erase(fiber.commits.begin());
  }
}

void run_grid(Blocks blocks, int threads, int64_t shared, void (*body)(const void*), const void* context) {
  if (threads <= 0 || threads > kMostThreads || threads % kWarp != 0) fail("threads of a block: not warps, up to 1024");
  if (shared < 0 || shared > kMostShared) fail("more shared memory than a block can have");
  if (blocks.y > 65535 || blocks.z > 65535 || blocks.x > 0x7fffffff) fail("more blocks than a grid can have");
  const Order order = asked_order();
  Device& d = device();
  d.body = body;
  d.context = context;
  size_of_block = {static_cast<unsigned>(threads), 1, 1};
  size_of_grid = {static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y), static_cast<unsigned>(blocks.z)};
  for (unsigned z = 0; z < size_of_grid.z; ++z)
    for (unsigned y = 0; y < size_of_grid.y; ++y)
      for (unsigned x = 0; x < size_of_grid.x; ++x) {
        current_block = {x, y, z};
        run_block(threads, shared, order);
      }
}

}  // namespace awq::cuda
