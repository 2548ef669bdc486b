// What kernels for Hopper (sm_90a) are written in, besides device.h: barriers in shared memory, the engine that copies
// boxes of a matrix, and products of a warpgroup. As there, gpu/hopper.h and host/hopper.h both define
//
//   kHopper: whether this code is compiled for sm_90a; all below may only be used where it is
//   has_hopper(kernel, threads): on the host, whether the current device is a Hopper for which `kernel` is compiled
//   shared_address(pointer): in shared memory, as descriptors count it
//
//   more_registers<N>(), fewer_registers<N>(): the warpgroup, all of it, gets so many for each thread, a multiple of 8
//
//   Barrier, 8 bytes in shared memory, and phases, of which each ends when all arrivals and all bytes have come:
//   init_barrier(b, arrivals), then fence_barriers() in the same thread, then sync_block(), before any other use
//   arrive(b); arrive_expecting(b, bytes): the phase also waits for so many bytes of copies
//   wait_barrier(b, parity): until the phase of that parity has ended; the first has parity 0
//
//   TensorMap: a matrix of 16-bit numbers in global memory, and the size of the boxes that are copied of it;
//   a kernel takes it as `const __grid_constant__ TensorMap`
//   make_tensor_map(map, data, rows, columns, pitch, box_rows): on the host, returns 0 or an error; boxes are box_rows
//     rows of 64 numbers, swizzled (see swizzled()); data and 2 pitch are multiples of 16 bytes
//   copy_box(to, map, column, row, b): a box from there on to shared memory, at a multiple of 1024; what lies outside
//     the matrix is 0. Counts as all its bytes at barrier b.
//   copy_bytes(to, from, bytes, b): multiples of 16, all three
//
//   A product m64nNk16 of the 128 threads of a warpgroup (PTX manual, "Register Fragments" of wgmma): D += A B, N = 8
//   kEights. A is in registers; warp w of the four has rows 16 w .., laid out as in an mma m16n8k16. B is in shared
//   memory, named by a descriptor (below). d[j] are columns 8 j .., laid out as C of an mma.
//   fence_products(): after any other access to a or d, before the next product
//   multiply_f16, multiply_bf16(d, a, descriptor, add): D = A B where add is false. a, d and B belong to the product
//     until it has been waited for
//   commit_products(); wait_products<N>(): until at most N commits are open. wait_products<0>(d): and d may be read
#pragma once

#include "cuda/device.h"

namespace awq::cuda {

constexpr int kGroupThreads = 128;  // of a warpgroup

// The descriptor of a matrix B [columns][channels] in shared memory, channels in the rows of 128 bytes that copy_box
// makes, from a multiple of 1024 bytes plus the channel's on (PTX manual, "Matrix Descriptor Format"): bits 0-13 the
// address, 16-29 the bytes from eight channels to the next (not used where swizzled; 1 by convention), 32-45 those from
// eight columns to the next, all without their four low bits; 62-63 the swizzle, 1 for 128 bytes.
__device__ inline uint64_t swizzled_matrix(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 | (address & 0x3ffffu) >> 4;
}

}  // namespace awq::cuda

#ifdef __CUDACC__
#include "cuda/gpu/hopper.h"
#else
#include "cuda/host/hopper.h"
#endif
