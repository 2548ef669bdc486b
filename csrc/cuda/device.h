// What kernels of this folder are written in. A kernel is one source for two compilers: nvcc, with the definitions of
// gpu/device.h, and any C++ compiler, with those of host/device.h, where it runs without a GPU to be tested.
//
// Both define
//   threadIdx, blockIdx, blockDim, gridDim; __global__, __device__, __launch_bounds__
//   launch(stream, blocks, threads, shared bytes, kernel, arguments...)   returns 0 or a CUDA error code
//   multiprocessors(): on the host, those of the current device
//   shared_memory(): the block's, 16-byte aligned; sync_block(): all threads of the block must come
//   shared_limit(): bytes of shared memory that a block can have, on the current device
//   sync_warp(): all 32 lanes must come; copies that a lane has waited for, and what it wrote, are there for the others
//   warp_xor(v, mask), warp_from(v, lane): all 32 lanes must come
//   copy16(to, from, bytes), commit_copies(), wait_copies<N>(): 16 bytes from global to shared memory, of which the
//     first `bytes` (0, 8 or 16) are read and the rest are 0; the copies of a thread are there after it waits until at
//     most N of its commits are open, those of other threads after sync_block() too, or
//     sync_warp() in a warp
//   copy16_if(there, to, from, bytes): the same where `there`, else nothing; without a branch
//   mma_f16, mma_bf16: the product m16n8k16 of a warp, fragments as in "Matrix Fragments for mma.m16n8k16" of the PTX
//     manual; sums fp32
//   half_bits, half_value, bf16_bits, bf16_value: conversions, to nearest even; half_pair, bf16_pair: of two floats,
//   the
//     first in the low half of a word
//   fma_half2, fma_bf16x2: a * b + c of pairs, rounded once; subnormal numbers are numbers
//   pick_bytes(lo, hi, numbers): byte i of the result is byte (hex digit i of numbers) of the eight in hi:lo
//   bits_of(float), float_of(bits)
//
// Products and sums are not contracted (nvcc --fmad=false, -ffp-contract=off): integers that come from them agree with
// the reference bit for bit. An fma is written out as fma_rn.
#pragma once

#include <cstdint>

namespace awq::cuda {

struct Blocks {
  int64_t x = 1;
  int64_t y = 1;
  int64_t z = 1;
};

enum class Type : int64_t { f32 = 0, f16 = 1, bf16 = 2 };

constexpr int kWarp = 32;

}  // namespace awq::cuda

#ifdef __CUDACC__
#include "cuda/gpu/device.h"
#else
#include "cuda/host/device.h"
#endif

namespace awq::cuda {

// Number i of an array of that type, as fp32.
__device__ inline float load(const void* data, Type type, int64_t i) {
  if (type == Type::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == Type::f16 ? half_value(bits) : bf16_value(bits);
}

__device__ inline float value_of(uint16_t bits, Type type) {
  return type == Type::f16 ? half_value(bits) : bf16_value(bits);
}

__device__ inline uint16_t bits_in(float value, Type type) {
  return type == Type::f16 ? half_bits(value) : bf16_bits(value);
}

__device__ inline void store(void* data, Type type, int64_t i, float value) {
  if (type == Type::f32)
    static_cast<float*>(data)[i] = value;
  else
    static_cast<uint16_t*>(data)[i] = bits_in(value, type);
}

}  // namespace awq::cuda
