// Barriers in shared memory and the copies that they wait for; see host/hopper.h.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "cuda/hopper.h"
#include "cuda/host/block.h"
#include "cuda/host/hopper_parts.h"

namespace awq::cuda {
namespace {

struct Copy {
  unsigned char* to;
  int bytes;
  const TensorMap* map;  // null for copy_bytes
  const void* from;
  int column, row;
};

struct State {
  int arrivals;  // that end a phase
  int missing;
  int64_t bytes = 0;
  unsigned phase = 0;
  unsigned maker;      // the thread
  bool known = false;  // after fence_barriers()
  int waiting = 0;     // threads
  std::vector<Copy> copies;
};

// What the 8 bytes of a barrier hold here: its state is elsewhere.
constexpr Barrier kMark = 0xba221e2ba221e200u;
std::map<const Barrier*, State> barriers;

State& state_of(const Barrier* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end() || *barrier != kMark) fail("a barrier that was not made, or was overwritten");
  if (!found->second.known) fail("a barrier is used without fence_barriers()");
  return found->second;
}

void end_phase_if_complete(State& state) {
  if (state.missing != 0 || state.bytes != 0) return;
  ++state.phase;
  state.missing = state.arrivals;
}

// The address in a box [rows][128 bytes], with 16-byte pieces exchanged: bits 4-6 xor bits 7-9.
unsigned char* swizzled(unsigned char* box, int offset) {
  const uint32_t plain = shared_address(box) + static_cast<uint32_t>(offset);
  return box + offset + (static_cast<int64_t>(plain ^ (plain >> 3 & 0x70)) - plain);
}

void perform(const Copy& copy) {
  if (copy.map == nullptr) {
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    return;
  }
  const TensorMap& map = *copy.map;
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const int64_t row = int64_t{copy.row} + r, column = int64_t{copy.column} + c;
      const bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
      const uint16_t value = inside ? map.data[row * map.pitch + column] : uint16_t{0};
      std::memcpy(swizzled(copy.to, r * 128 + c / 8 * 16) + c % 8 * 2, &value, 2);
    }
}

void perform_first(State& state) {
  const Copy copy = state.copies.front();
  state.copies.erase(state.copies.begin());
  perform(copy);
  state.bytes -= copy.bytes;
  if (state.bytes < 0) fail("a barrier gets more bytes than it was told to expect");
  end_phase_if_complete(state);
}

void start_copy(const Copy& copy, Barrier* barrier) {
  State& state = state_of(barrier);
  const int64_t begin = copy.to - shared_memory(), end = begin + copy.bytes;
  if (begin < 0 || end > shared_size()) fail("a copy to outside the block's shared memory");
  if (read_by_products(begin, end)) fail("a copy over what a product still reads");
  state.copies.push_back(copy);
  if (early_copies()) perform_first(state);
}

struct Phase {
  const State* state;
  unsigned parity;
};

}  // namespace

bool early_copies() {
  const char* when = std::getenv("AWQ_EMULATED_COPIES");
  return when != nullptr && std::strcmp(when, "early") == 0;
}

bool being_copied(int64_t begin, int64_t end) {
  for (const auto& [barrier, state] : barriers)
    for (const Copy& copy : state.copies) {
      const int64_t first = copy.to - shared_memory();
      if (first < end && begin < first + copy.bytes) return true;
    }
  return false;
}

void begin_copies() { barriers.clear(); }

void end_copies() {
  for (const auto& [barrier, state] : barriers)
    if (!state.copies.empty() || state.bytes != 0) fail("copies to a barrier that nobody waited for");
}

bool finish_copy() {
  for (auto& [barrier, state] : barriers)
    if (!state.copies.empty() && state.missing == 0 && state.waiting > 0) {
      perform_first(state);
      return true;
    }
  return false;
}

void init_barrier(Barrier* barrier, int arrivals) {
  if (shared_address(barrier) % 8 != 0) fail("a barrier at an address that is not a multiple of 8");
  if (arrivals < 1 || arrivals >= 1 << 20) fail("a barrier for less than 1 or more than 2^20 - 1 arrivals");
  *barrier = kMark;
  barriers[barrier] = {.arrivals = arrivals, .missing = arrivals, .maker = current_thread.x, .copies = {}};
}

void fence_barriers() {
  for (auto& [barrier, state] : barriers) state.known |= state.maker == current_thread.x;
}

void arrive(Barrier* barrier) { arrive_expecting(barrier, 0); }

void arrive_expecting(Barrier* barrier, int bytes) {
  State& state = state_of(barrier);
  if (bytes < 0 || state.bytes + bytes >= 1 << 20) fail("a barrier that expects 2^20 bytes or more");
  if (state.missing == 0) fail("more arrivals at a barrier than it was made for");
  --state.missing;
  state.bytes += bytes;
  end_phase_if_complete(state);
  if (bytes == 0) give_way();  // so that who waits may overwrite what is given back
}

void wait_barrier(Barrier* barrier, int parity) {
  State& state = state_of(barrier);
  const Phase phase{&state, static_cast<unsigned>(parity)};
  ++state.waiting;
  wait_for(
      [](const void* of) {
        const auto& wanted = *static_cast<const Phase*>(of);
        return wanted.state->phase % 2 != wanted.parity;
      },
      &phase);
  --state.waiting;
}

int64_t make_tensor_map(TensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t pitch, int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 != 0) fail("a tensor map of an address that is not a multiple of 16");
  if (pitch % 8 != 0 || pitch * 2 >= int64_t{1} << 40) fail("a tensor map whose rows are not multiples of 16 bytes");
  if (rows < 1 || columns < 1 || rows > int64_t{1} << 32 || columns > pitch) fail("a tensor map of no such matrix");
  if (box_rows < 1 || box_rows > 256) fail("a tensor map with a box of more than 256 rows");
  map = {static_cast<const uint16_t*>(data), rows, columns, pitch, box_rows};
  return 0;
}

void copy_box(void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
  if (reinterpret_cast<uintptr_t>(&map) % 64 != 0) fail("a tensor map at an address that is not a multiple of 64");
  if (shared_address(to) % 1024 != 0) fail("a swizzled box at an address that is not a multiple of 1024");
  start_copy({static_cast<unsigned char*>(to), map.box_rows * 128, &map, nullptr, column, row}, barrier);
}

void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  if (shared_address(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0 || bytes <= 0)
    fail("copy_bytes of what is not a multiple of 16 bytes");
  start_copy({static_cast<unsigned char*>(to), bytes, nullptr, from, 0, 0}, barrier);
}

}  // namespace awq::cuda
