// y = x W^T for many rows of activations, on tensor cores.
//
// A block computes 128 rows by 128 outputs (four tiles), its eight warps 64 rows by one tile each. Channels pass by 64
// at a time, through a ring of kStages buffers in shared memory that cp.async fills: while one is multiplied, the next
// two are on their way. Codes are decoded in registers, to exact integers; a group's sums, in fp32, are multiplied by
// its scale when it ends. For weights whose groups are whole chunks of four steps, or with one group a row.
#pragma once

#include "cuda/linear_small.h"

namespace awq::cuda {

constexpr int kGemmRows = 128, kGemmTiles = 4, kGemmSteps = 16, kGemmThreads = 256, kStages = 3;

template <int kBits>
struct GemmStage {
  // Row r has 8 pieces of 16 bytes, in pairs; pair p lies at p ^ (r % 4), so that the four rows that half a warp reads
  // at a time, 32 bytes of each, are in different banks.
  alignas(16) uint8_t x[kGemmRows * 128];
  alignas(16) uint8_t codes[kGemmTiles * kGemmSteps * 16 * kBits];
};

template <int kBits>
__device__ inline void fill_stage(GemmStage<kBits>& stage, const Weight& w, const LinearRows& rows, int first_step) {
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kGemmRows * 8 / kGemmThreads; ++i) {
    const int piece = thread + i * kGemmThreads, r = piece / 8, c = piece % 8;
    const int64_t row = static_cast<int64_t>(blockIdx.y) * kGemmRows + r, channel = 4 * int64_t{first_step} + 8 * c;
    const bool there = row < rows.rows && channel < rows.pitch;
    copy16(stage.x + r * 128 + ((c / 2) ^ (r % 4)) * 32 + c % 2 * 16,
           there ? rows.x + row * rows.pitch + channel : rows.x, there ? 16 : 0);
  }
  constexpr int kTileBytes = kGemmSteps * 16 * kBits, kPieces = kGemmTiles * kTileBytes / 16;
#pragma unroll
  for (int i = 0; i < kPieces / kGemmThreads; ++i) {
    const int at = (thread + i * kGemmThreads) * 16, step = first_step + at % kTileBytes / (16 * kBits);
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * kGemmTiles + at / kTileBytes;
    const bool there = tile < w.tiles && step < w.steps;
    copy16(stage.codes + at, there ? w.codes + (tile * w.steps + step) * (16 * kBits) + at % (16 * kBits) : w.codes,
           there ? 16 : 0);
  }
}

// Writes two neighbouring sums. kPairs: at an even place, so that they are aligned, and both exist.
template <Type kType, bool kPairs>
__device__ inline void store_two(unsigned char* y, float low, float high, bool both) {
  struct alignas(8) Pair {
    float low, high;
  };
  if constexpr (kPairs && kType == Type::f32) {
    *reinterpret_cast<Pair*>(y) = {low, high};
  } else if constexpr (kPairs) {
    *reinterpret_cast<uint32_t*>(y) = kType == Type::f16 ? half_pair(low, high) : bf16_pair(low, high);
  } else {
    store(y, kType, 0, low);
    if (both) store(y, kType, 1, high);
  }
}

template <Type kType, bool kPairs, int kEights>
__device__ inline void store_all(const Weight& w, const LinearRows& rows, int64_t output, int64_t first,
                                 const float (&sums)[kEights][4]) {
  constexpr int64_t kBytes = kType == Type::f32 ? 4 : 2;
  const bool both = output + 1 < w.n;
  const float bias[2] = {bias_at(rows, output), both ? bias_at(rows, output + 1) : 0.0f};
  const int64_t row = first + 2 * (threadIdx.x % 4), there = rows.rows - row;
  const int left = static_cast<int>(there < 8 * kEights ? there : 8 * kEights);
  const int64_t pitch = w.n * kBytes;
  unsigned char* y = static_cast<unsigned char*>(rows.y) + row * pitch + output * kBytes;
#pragma unroll
  for (int r = 0; r < kEights; ++r, y += 8 * pitch)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (8 * r + i < left)
        store_two<kType, kPairs>(y + i * pitch, sums[r][i] + bias[0], sums[r][2 + i] + bias[1], both);
}

// Writes sums of a lane, fragments of C: `sums[r]` are of outputs output, output + 1 and rows first + 8 r + 2t, + 1.
template <Type kType, int kEights>
__device__ inline void store_sums(const Weight& w, const LinearRows& rows, int64_t output, int64_t first,
                                  const float (&sums)[kEights][4]) {
  if (output >= w.n) return;
  if (w.n % 2 == 0)
    store_all<kType, true>(w, rows, output, first, sums);
  else
    store_all<kType, false>(w, rows, output, first, sums);
}

// The same to y, or where the block has a part of the channels to its place in fp32 parts [gridDim.z][rows][n].
template <Type kType, int kEights>
__device__ inline void store_part(const Weight& w, LinearRows rows, int64_t output, int64_t first,
                                  const float (&sums)[kEights][4], float* parts) {
  if (parts == nullptr) {
    store_sums<kType>(w, rows, output, first, sums);
  } else {
    rows.y = parts + blockIdx.z * (rows.rows * w.n);
    rows.bias = nullptr;
    store_sums<Type::f32>(w, rows, output, first, sums);
  }
}

// Where a lane of a block that begins in the middle of a row stands: chunk `first`, of four steps.
struct GroupWalk {
  int group;     // that begins next, or is the first
  int left = 0;  // chunks until then
  int skip;      // chunks of the first group that other blocks multiply

  __device__ GroupWalk(const Weight& w, int first) {
    const int chunks = w.groups == 1 ? first + 1 : w.group_steps / 4;
    group = first / chunks;
    skip = first % chunks;
  }
  __device__ void begin(const Weight& w) {
    left = (steps_of(w, group++) + 3) / 4 - skip;
    skip = 0;
  }
};

// Multiplies `length` rounds of channels in each of gridDim.z parts. Sums of all channels go to y, those of a part to
// its place in `parts`.
template <int kBits, bool kHalf>
__global__ void __launch_bounds__(kGemmThreads, 1) linear_gemm(Weight w, LinearRows rows, int length, float* parts) {
  auto* stages = reinterpret_cast<GemmStage<kBits>*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, tile_here = warp % kGemmTiles, half = warp / kGemmTiles;
  const int tile = static_cast<int>(blockIdx.x) * kGemmTiles + tile_here;
  const int chunks = (w.steps + 3) / 4, all = (w.steps + kGemmSteps - 1) / kGemmSteps;
  const int first = static_cast<int>(blockIdx.z) * length, rounds = all - first < length ? all - first : length;

  LaneSums<8> sums;
  GroupBits<kBits> bits = {}, next = {};
  Decoder<kBits, kHalf> decoder = {};
  GroupWalk walk(w, first * (kGemmSteps / 4));
  if (tile < w.tiles) next.read(w, tile, walk.group, g);

  for (int i = 0; i < kStages - 1; ++i) {
    if (i < rounds) fill_stage<kBits>(stages[i], w, rows, (first + i) * kGemmSteps);
    commit_copies();
  }
  for (int round = 0; round < rounds; ++round) {
    wait_copies<kStages - 2>();
    sync_block();  // all have multiplied what is now overwritten, too
    const int fresh = round + kStages - 1;
    if (fresh < rounds) fill_stage<kBits>(stages[fresh % kStages], w, rows, (first + fresh) * kGemmSteps);
    commit_copies();
    const GemmStage<kBits>& stage = stages[round % kStages];
#pragma unroll 1
    for (int c = 0; c < kGemmSteps / 4 && (first + round) * (kGemmSteps / 4) + c < chunks; ++c) {
      if (walk.left == 0) {
        bits = next;
        decoder.set(bits);
        walk.begin(w);
        if (walk.group < w.groups && tile < w.tiles) next.read(w, tile, walk.group, g);
      }
      const uint8_t* step = stage.codes + (tile_here * kGemmSteps + c * 4 + t) * (16 * kBits);
      uint32_t a[2][4];
      decoder.fragments(load_words<kBits>(step + 8 * g), a);
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int row = half * 64 + 8 * r + g;
        const uint8_t* x = stage.x + row * 128 + (c ^ (row % 4)) * 32 + 8 * t;
        sums.template multiply<kHalf>(a, r, *reinterpret_cast<const Activations*>(x));
      }
      if (--walk.left == 0) sums.end_group(w, bits);
    }
  }
  if (walk.left != 0) sums.end_group(w, bits);  // which other blocks go on with
  wait_copies<0>();
  sums.template finish<Decoder<kBits, kHalf>>();
#pragma unroll
  for (int h = 0; h < 2; ++h)
    store_part<kHalf ? Type::f16 : Type::bf16>(w, rows, int64_t{tile} * 32 + 16 * h + 2 * g,
                                               static_cast<int64_t>(blockIdx.y) * kGemmRows + half * 64, sums.total[h],
                                               parts);
}

}  // namespace awq::cuda
