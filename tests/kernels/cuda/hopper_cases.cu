// Small kernels of what cuda/hopper.h lists, right ones and wrong ones. Run by test_hopper.py on the emulated GPU.
#include "cuda/hopper.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace awq::cuda {
namespace {

struct Inside {
  uint8_t x[2][64 * 128];
  Barrier barriers[4];

  static constexpr int64_t bytes() { return int64_t{sizeof(Inside)} + 1024 - 16; }
  static Inside& here() {
    unsigned char* begin = shared_memory();
    return *reinterpret_cast<Inside*>(begin + (0 - shared_address(begin)) % 1024);
  }
  // For `arrivals` at each.
  void start(int arrivals, bool fence = true) {
    if (threadIdx.x == 0) {
      for (Barrier& barrier : barriers) init_barrier(&barrier, arrivals);
      if (fence) fence_barriers();
    }
    sync_block();
  }
};

// The fragment of A [64][64], fp16, for channels 16 c .., of this thread.
void fragment(const uint16_t* a, int c, uint32_t (&out)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int r = 0; r < 4; ++r) {
    const uint16_t* at = a + (16 * warp + lane / 4 + r % 2 * 8) * 64 + 16 * c + lane % 4 * 2 + r / 2 * 8;
    out[r] = at[0] | static_cast<uint32_t>(at[1]) << 16;
  }
}

// d [64][64] = a [64][64] x^T, of a box of x [rows][columns] from (row, column) on. `wrong` is xored to descriptors.
__global__ void product(const uint16_t* a, const __grid_constant__ TensorMap map, int column, int row, uint64_t wrong,
                        float* d) {
  Inside& shared = Inside::here();
  shared.start(1);
  if (threadIdx.x == 0) {
    arrive_expecting(&shared.barriers[0], 64 * 128);
    copy_box(shared.x[0], map, column, row, &shared.barriers[0]);
  }
  wait_barrier(&shared.barriers[0], 0);
  float sums[8][4];
  uint32_t fragments[4][4];
  for (int c = 0; c < 4; ++c) fragment(a, c, fragments[c]);
  fence_products();
  for (int c = 0; c < 4; ++c) {
    const uint64_t b = swizzled_matrix(shared_address(shared.x[0]) + static_cast<uint32_t>(32 * c)) ^ wrong;
    multiply_f16(sums, fragments[c], b, c > 0);
  }
  commit_products();
  wait_products<0>(sums);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int j = 0; j < 8; ++j)
    for (int i = 0; i < 4; ++i) d[(16 * warp + lane / 4 + i / 2 * 8) * 64 + 8 * j + lane % 4 * 2 + i % 2] = sums[j][i];
}

// out = in, 16 bytes at a time through one buffer. The last warp copies, the first reads: all its lanes must have read
// before the buffer is given back, which they do not wait for where `too_soon`.
__global__ void pass_on(const uint32_t* in, uint32_t* out, int pieces, bool too_soon) {
  Inside& shared = Inside::here();
  shared.start(1);
  Barrier *full = &shared.barriers[0], *empty = &shared.barriers[1];
  if (threadIdx.x == kWarp) {
    for (int i = 0; i < pieces; ++i) {
      if (i > 0) wait_barrier(empty, (i - 1) % 2);
      arrive_expecting(full, 16);
      copy_bytes(shared.x[0], in + 4 * i, 16, full);
    }
  } else if (threadIdx.x < kWarp) {
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = 0; i < pieces; ++i) {
      wait_barrier(full, i % 2);
      if (too_soon && lane == 0) arrive(empty);
      warp_xor(0, 1);
      const uint32_t got = reinterpret_cast<const uint32_t*>(shared.x[0])[lane % 4];
      warp_xor(0, 1);
      if (!too_soon && lane == 0) arrive(empty);
      if (lane < 4) out[4 * i + lane] = got;
    }
  }
}

enum Fault {
  box_not_aligned,
  no_fence_of_barriers,
  no_fence_of_products,
  fragment_after_fence,
  read_too_soon,
  overwritten_too_soon,
  product_not_waited_for,
  copy_not_waited_for,
  too_many_arrivals,
  too_few_arrivals,
  too_many_bytes,
  barrier_overwritten,
  different_products,
  half_a_warpgroup,
  outside,
};

__global__ void faulty(Fault fault, const __grid_constant__ TensorMap map) {
  Inside& shared = Inside::here();
  const bool first = threadIdx.x == 0;
  shared.start(1, fault != no_fence_of_barriers);
  Barrier *come = &shared.barriers[0], *again = &shared.barriers[1];
  if (first) {
    arrive_expecting(come, fault == too_many_bytes ? 64 * 128 - 16 : 64 * 128);
    copy_box(shared.x[0] + (fault == box_not_aligned ? 512 : 0), map, 0, 0, come);
  }
  if (fault == copy_not_waited_for) return;
  if (fault == too_many_arrivals && first) arrive(come);
  if (fault == too_few_arrivals) wait_barrier(again, 0);
  if (fault == barrier_overwritten && first) *again = 0;
  if (fault != read_too_soon) wait_barrier(come, 0);
  if (fault == barrier_overwritten) wait_barrier(again, 0);
  if (fault == half_a_warpgroup && threadIdx.x >= 64) return;
  float sums[8][4] = {};
  uint32_t a[4] = {};
  if (fault == no_fence_of_products) {
    fence_products();
    wait_products<0>();
  } else {
    fence_products();
  }
  const uint32_t at = fault == outside ? 250 * 1024 : shared_address(shared.x[0]);
  multiply_f16(sums, a, swizzled_matrix(at + (fault == different_products ? threadIdx.x / kWarp * 32 : 0)), false);
  if (fault == fragment_after_fence) {
    a[0] = 1;
    multiply_f16(sums, a, swizzled_matrix(at), true);
  }
  commit_products();
  if (fault == product_not_waited_for) return;
  if (fault == overwritten_too_soon && first) {
    arrive_expecting(again, 64 * 128);
    copy_box(shared.x[0], map, 0, 0, again);
  }
  wait_products<0>(sums);
}

// Whether sums and fragments belong to a product until it is waited for: out [0] is what a sum of ones is found to be
// before it is, [1] after, [2] after where the fragment was changed meanwhile.
__global__ void early(const __grid_constant__ TensorMap ones, float* out) {
  Inside& shared = Inside::here();
  shared.start(1);
  if (threadIdx.x == 0) {
    arrive_expecting(&shared.barriers[0], 64 * 128);
    copy_box(shared.x[0], ones, 0, 0, &shared.barriers[0]);
  }
  wait_barrier(&shared.barriers[0], 0);
  for (int change = 0; change < 2; ++change) {
    float sums[8][4] = {};
    uint32_t a[4] = {0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00};
    fence_products();
    multiply_f16(sums, a, swizzled_matrix(shared_address(shared.x[0])), true);
    commit_products();
    if (threadIdx.x == 0 && change == 0) out[0] = sums[0][0];
    if (change == 1) a[0] = 0;
    wait_products<0>(sums);
    if (threadIdx.x == 0) out[1 + change] = sums[0][0];
  }
}

}  // namespace
}  // namespace awq::cuda

using namespace awq::cuda;

EXPORTED void hopper_product(const void* a, const void* x, int64_t rows, int64_t columns, int64_t pitch, int64_t column,
                             int64_t row, uint64_t wrong, void* d) {
  TensorMap map;
  make_tensor_map(map, x, rows, columns, pitch, 64);
  launch(nullptr, {1}, kGroupThreads, Inside::bytes(), product, static_cast<const uint16_t*>(a), map,
         static_cast<int>(column), static_cast<int>(row), wrong, static_cast<float*>(d));
}

EXPORTED void hopper_pass_on(const void* in, void* out, int64_t pieces, int64_t too_soon) {
  launch(nullptr, {1}, 2 * kWarp, Inside::bytes(), pass_on, static_cast<const uint32_t*>(in),
         static_cast<uint32_t*>(out), static_cast<int>(pieces), too_soon != 0);
}

EXPORTED void hopper_fault(int64_t fault, const void* x) {
  TensorMap map;
  make_tensor_map(map, x, 64, 64, 64, 64);
  launch(nullptr, {1}, kGroupThreads, Inside::bytes(), faulty, static_cast<Fault>(fault), map);
}

EXPORTED void hopper_early(const void* ones, void* out) {
  TensorMap map;
  make_tensor_map(map, ones, 64, 64, 64, 64);
  launch(nullptr, {1}, kGroupThreads, Inside::bytes(), early, map, static_cast<float*>(out));
}
