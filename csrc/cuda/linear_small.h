// y = x W^T for few rows of activations: every code is read once for up to 32 rows, so memory decides.
// For weights that linear_few.h does not take.
//
// A block computes one tile of 32 outputs, its warps parts of the row of channels. A chunk is four steps of one group
// (the last of a group may have fewer), one product of each half tile with each 8 rows. Sums of a group are multiplied
// by its scale when it ends, in fp32. The warps' sums are added in the order of their numbers, so the result does not
// depend on what runs when.
#pragma once

#include <cstdlib>
#include <cstring>

#include "cuda/tiles.h"

namespace awq::cuda {

// Rows beyond which a kernel for many rows is taken, where the weight's groups allow it.
constexpr int64_t kSmallRows = 32;

// Whether a variable of the environment has this value.
inline bool wished(const char* variable, const char* value) {
  const char* wish = std::getenv(variable);
  return wish != nullptr && std::strcmp(wish, value) == 0;
}

struct LinearRows {
  const uint16_t* x;  // [rows][pitch]
  int64_t pitch;
  int64_t rows;
  const void* bias;  // null for none
  Type bias_type;
  void* y;  // [rows][n]
};

__device__ inline float bias_at(const LinearRows& rows, int64_t output) {
  return rows.bias == nullptr ? 0.0f : load(rows.bias, rows.bias_type, output);
}

// A place in a row: chunk `chunk` of group `group`.
struct Cursor {
  int group;
  int chunk;

  __device__ void next(const Weight& w) {
    if (++chunk * 4 >= steps_of(w, group)) {
      chunk = 0;
      ++group;
    }
  }
};

constexpr int kAhead = 4;  // chunks whose codes are asked for before the ones in hand are multiplied

template <int kBits>
__device__ inline void read_ahead(const Weight& w, int tile, Cursor& at, int count, int lane,
                                  LaneWords<kBits> (&words)[kAhead]) {
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int u = 0; u < kAhead; ++u) {
    words[u] = {};
    if (u >= count) continue;
    const int step = at.chunk * 4 + t;
    if (step < steps_of(w, at.group)) {
      const int64_t place = static_cast<int64_t>(tile) * w.steps + at.group * w.group_steps + step;
      words[u] = load_words<kBits>(w.codes + place * (16 * kBits) + 8 * g);
    }
    at.next(w);
  }
}

// Adds up what the warps of a block have summed, and writes it.
template <bool kHalf, int kEights>
__device__ inline void store_rows(const Weight& w, const LinearRows& rows, const LaneSums<kEights>& lane_sums) {
  constexpr int kSums = 8 * kEights;  // of a lane
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  float* sums = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[(warp * kSums + i) * kWarp + lane] = lane_sums.total[i / 4 % 2][i / 8][i % 4];
  sync_block();
  for (int e = static_cast<int>(threadIdx.x); e < kSums * kWarp; e += static_cast<int>(blockDim.x)) {
    float sum = 0.0f;
    for (int v = 0; v < warps; ++v) sum += sums[v * kSums * kWarp + e];
    const int i = e / kWarp, of = e % kWarp;
    const int64_t row = static_cast<int64_t>(blockIdx.y) * (8 * kEights) + 8 * (i / 8) + 2 * (of % 4) + i % 2;
    const int64_t output = static_cast<int64_t>(blockIdx.x) * 32 + 16 * (i / 4 % 2) + 2 * (of / 4) + i % 4 / 2;
    if (row < rows.rows && output < w.n)
      store(rows.y, kHalf ? Type::f16 : Type::bf16, row * w.n + output, sum + bias_at(rows, output));
  }
}

// The lane's activations of row `row`, in step `step` of the group at `at`; 0 past either end.
__device__ inline Activations read_row(const Weight& w, const LinearRows& rows, int64_t row, Cursor at, int step) {
  if (step >= steps_of(w, at.group) || row >= rows.rows) return {{0, 0}};
  const int64_t channel = 4 * (static_cast<int64_t>(at.group) * w.group_steps + step);
  return *reinterpret_cast<const Activations*>(rows.x + row * rows.pitch + channel);
}

// kEights: rows of a block, in eights. Shared memory: the sums of each warp, fp32 [8 kEights][32].
constexpr int most_warps(int eights) { return eights == 4 ? 8 : 16; }

template <int kBits, bool kHalf, int kEights>
__global__ void __launch_bounds__(most_warps(kEights) * kWarp, 1) linear_small(Weight w, LinearRows rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, tile = static_cast<int>(blockIdx.x);
  const int64_t warp = static_cast<int>(threadIdx.x) / kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
  const int group_chunks = (w.group_steps + 3) / 4;
  const int chunks = (w.groups - 1) * group_chunks + (steps_of(w, w.groups - 1) + 3) / 4;
  const int begin = static_cast<int>(chunks * warp / warps), end = static_cast<int>(chunks * (warp + 1) / warps);

  LaneSums<kEights> sums;
  GroupBits<kBits> bits = {};
  Decoder<kBits, kHalf> decoder = {};
  Cursor here{begin / group_chunks, begin % group_chunks}, ahead = here;
  LaneWords<kBits> words[kAhead], next[kAhead];
  read_ahead<kBits>(w, tile, ahead, end - begin, lane, next);
  int open = -1;  // the group that is being added up
  for (int chunk = begin; chunk < end; chunk += kAhead) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u) words[u] = next[u];
    read_ahead<kBits>(w, tile, ahead, end - chunk - kAhead, lane, next);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (chunk + u >= end) continue;
      if (here.group != open) {
        if (open >= 0) sums.end_group(w, bits);
        open = here.group;
        bits.read(w, tile, open, lane / 4);
        decoder.set(bits);
      }
      uint32_t a[2][4];
      decoder.fragments(words[u], a);
#pragma unroll
      for (int r = 0; r < kEights; ++r) {
        const int64_t row = static_cast<int64_t>(blockIdx.y) * (8 * kEights) + 8 * r + lane / 4;
        sums.template multiply<kHalf>(a, r, read_row(w, rows, row, here, here.chunk * 4 + lane % 4));
      }
      here.next(w);
    }
  }
  if (open >= 0) sums.end_group(w, bits);
  sums.template finish<Decoder<kBits, kHalf>>();
  store_rows<kHalf>(w, rows, sums);
}

}  // namespace awq::cuda
