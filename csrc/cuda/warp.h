// Sums and extremes over a warp; every lane gets the result, which is the same in all of them.
#pragma once

#include "cuda/device.h"

namespace awq::cuda {

template <class T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += warp_xor(value, mask);
  return value;
}

__device__ inline float warp_min(float value) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const float other = warp_xor(value, mask);
    value = other < value ? other : value;
  }
  return value;
}

__device__ inline float warp_max(float value) { return -warp_min(-value); }

// Kernels with a warp for each item: eight warps a block.
constexpr int kItemWarps = 8;

__device__ inline int64_t warp_item() {
  return static_cast<int64_t>(blockIdx.x) * kItemWarps + static_cast<int>(threadIdx.x) / kWarp;
}
__device__ inline int warp_lane() { return static_cast<int>(threadIdx.x) % kWarp; }

template <class Kernel, class... Arguments>
int64_t launch_warps(void* stream, int64_t items, Kernel kernel, Arguments... arguments) {
  return launch(stream, {(items + kItemWarps - 1) / kItemWarps}, kItemWarps * kWarp, 0, kernel, arguments...);
}

// One thread for each item.
constexpr int kItemThreads = 256;

__device__ inline int64_t thread_item() { return static_cast<int64_t>(blockIdx.x) * kItemThreads + threadIdx.x; }

template <class Kernel, class... Arguments>
int64_t launch_items(void* stream, int64_t items, Kernel kernel, Arguments... arguments) {
  return launch(stream, {(items + kItemThreads - 1) / kItemThreads}, kItemThreads, 0, kernel, arguments...);
}

}  // namespace awq::cuda
