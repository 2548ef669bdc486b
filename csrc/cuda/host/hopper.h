// The definitions of cuda/hopper.h for a C++ compiler.
//
// What is asynchronous is done as late as the rules allow: a copy to shared memory when no thread can go on without it,
// a product when its thread waits for it, with what is then in its registers and in shared memory. With
// AWQ_EMULATED_COPIES=early in the environment a copy is done at once: then a buffer that is given back too soon shows.
// What the hardware checks, or what would be undefined there, ends the process with a message: addresses that are not
// aligned, a copy over what a product still reads, a product that reads what is still being copied, a missing fence,
// a barrier that was not made known or gets too many arrivals, warps of a warpgroup that do not multiply the same.
#pragma once

#include <cstdint>

#define __grid_constant__

namespace awq::cuda {

constexpr bool kHopper = true;

template <class Kernel>
bool has_hopper(Kernel, int) {
  return true;
}

// Shared memory begins here. On a GPU too it need not begin at a multiple of more than 16 bytes.
constexpr uint32_t kSharedBegin = 1024 + 16;
inline uint32_t shared_address(const void* pointer) {
  return kSharedBegin + static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_memory());
}

template <int kCount>
void more_registers() {}
template <int kCount>
void fewer_registers() {}

using Barrier = uint64_t;
void init_barrier(Barrier* barrier, int arrivals);
void fence_barriers();
void arrive(Barrier* barrier);
void arrive_expecting(Barrier* barrier, int bytes);
void wait_barrier(Barrier* barrier, int parity);

struct alignas(64) TensorMap {
  const uint16_t* data;
  int64_t rows, columns, pitch;
  int box_rows;
};
int64_t make_tensor_map(TensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t pitch, int box_rows);
void copy_box(void* to, const TensorMap& map, int column, int row, Barrier* barrier);
void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier);

void fence_products();
void start_product(float* d, int eights, const uint32_t* a, uint64_t b, bool add, float (*value)(uint16_t));
void commit_products();
void wait_products_open(int open);

template <int kEights>
void multiply_f16(float (&d)[kEights][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  start_product(&d[0][0], kEights, a, b, add, half_value);
}
template <int kEights>
void multiply_bf16(float (&d)[kEights][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  start_product(&d[0][0], kEights, a, b, add, bf16_value);
}
template <int kOpen>
void wait_products() {
  wait_products_open(kOpen);
}
template <int kOpen, int kEights>
void wait_products(float (&)[kEights][4]) {
  static_assert(kOpen == 0);
  wait_products_open(0);
}

}  // namespace awq::cuda
