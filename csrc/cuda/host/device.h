// The definitions of cuda/device.h for a C++ compiler: a GPU small enough to test kernels on.
//
// Blocks run one after another. The threads of a block are fibers; each runs until it must wait for others, then the
// next one does, in ascending order of their numbers or, with AWQ_EMULATED_ORDER=descending in the environment, in
// descending order: a kernel that misses a barrier gives two different results. With "lowest" or "highest" in its
// place, the first or the last warp that can run does, so that warps get as far ahead of each other as they can. Shared
// memory is filled with NaN before every block and has a guard behind it. A copy16 is done as late as the rules allow,
// when its thread waits for it, or with AWQ_EMULATED_COPIES=early at once. A barrier that not all threads reach, and a
// write behind shared memory, end the process with a message.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __launch_bounds__(...)

namespace awq::cuda {

struct Index {
  unsigned x = 0;
  unsigned y = 0;
  unsigned z = 0;
};

// Of the thread that runs now.
extern Index current_thread, current_block, size_of_block, size_of_grid;

#define threadIdx ::awq::cuda::current_thread
#define blockIdx ::awq::cuda::current_block
#define blockDim ::awq::cuda::size_of_block
#define gridDim ::awq::cuda::size_of_grid

unsigned char* shared_memory();
void sync_block();
void sync_warp();
int64_t shared_limit();

// Shows `size` bytes to the other lanes of the warp, waits for theirs, and returns those of all 32, one after another.
constexpr int kLaneBytes = 24;
const unsigned char* exchange(const void* mine, int size);

template <class T>
T lane_value(const unsigned char* lanes, int lane) {
  T value;
  std::memcpy(&value, lanes + lane * kLaneBytes, sizeof(T));
  return value;
}

template <class T>
T warp_xor(T value, int mask) {
  static_assert(sizeof(T) <= kLaneBytes);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return lane_value<T>(exchange(&value, sizeof(T)), lane ^ mask);
}

template <class T>
T warp_from(T value, int lane) {
  static_assert(sizeof(T) <= kLaneBytes);
  return lane_value<T>(exchange(&value, sizeof(T)), lane);
}

void copy16(void* to, const void* from, int bytes);
inline void copy16_if(bool there, void* to, const void* from, int bytes) {
  if (there) copy16(to, from, bytes);
}
void commit_copies();
void wait_until_open(int open);
template <int kOpen>
void wait_copies() {
  wait_until_open(kOpen);
}

inline uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float fma_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float half_value(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline uint16_t half_bits(float value) { return std::bit_cast<uint16_t>(static_cast<_Float16>(value)); }
inline float bf16_value(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
inline uint16_t bf16_bits(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint32_t half_pair(float low, float high) { return uint32_t{half_bits(high)} << 16 | half_bits(low); }
inline uint32_t bf16_pair(float low, float high) { return uint32_t{bf16_bits(high)} << 16 | bf16_bits(low); }

template <float (*value)(uint16_t), uint16_t (*bits)(float)>
uint32_t fma_pairs(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto of = [shift](uint32_t pair) { return value(static_cast<uint16_t>(pair >> shift)); };
    out |= static_cast<uint32_t>(bits(fma_rn(of(a), of(b), of(c)))) << shift;
  }
  return out;
}

inline uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) { return fma_pairs<half_value, half_bits>(a, b, c); }
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) { return fma_pairs<bf16_value, bf16_bits>(a, b, c); }
inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t numbers) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> ((numbers >> (4 * i) & 7) * 8) & 255) << (8 * i);
  return out;
}

void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float (*value)(uint16_t));
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(c, a, b, half_value); }
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma(c, a, b, bf16_value); }

inline int64_t multiprocessors() { return 12; }  // of which small tests leave many idle

// Runs `body(context)` in every thread of every block.
void run_grid(Blocks blocks, int threads, int64_t shared, void (*body)(const void*), const void* context);

template <class... Parameters, class... Arguments>
int64_t launch(void*, Blocks blocks, int threads, int64_t shared, void (*kernel)(Parameters...),
               Arguments... arguments) {
  const auto call = [=] { kernel(static_cast<Parameters>(arguments)...); };
  const auto body = [](const void* context) { (*static_cast<const decltype(call)*>(context))(); };
  run_grid(blocks, threads, shared, body, &call);
  return 0;
}

}  // namespace awq::cuda
