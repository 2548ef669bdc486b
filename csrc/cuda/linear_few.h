// y = x W^T for up to 32 rows of regular weights: groups of a multiple of 32 channels, or one group a row of such a
// length. linear_small.h takes all others. There it is the arithmetic of places, groups and bounds that takes the time,
// not memory; here next to none is left in the loop, and what is on its way from memory does not wait in registers.
//
// A block computes one tile of 32 outputs, its warps parts of the row of channels. A warp works alone until the end: it
// has a ring in shared memory, which it fills by cp.async with pairs of chunks, 32 channels each, and their
// activations. What has been read is replaced at once by what comes a ring later. Pairs make up stages, of one group
// each, within which all places are constants and nothing branches.
//
// Lane 4 g + t multiplies steps 2t and 2t + 1 of a pair, one in each chunk, so its activations of a row are 16 bytes
// that follow each other. Sums of a stage, in the order of its pairs, even steps of each first, are multiplied by the
// scale of its group and added up in fp32; the warps' sums are added in the order of their numbers. So the result
// depends on sizes and on the number of warps, never on what runs when.
#pragma once

#include <algorithm>

#include "cuda/few_ring.h"
#include "cuda/linear_small.h"

namespace awq::cuda {

// Unless AWQ_EXT_CUDA_FEW=0 is in the environment.
inline bool few_takes(const Weight& w, int64_t rows) {
  return !wished("AWQ_EXT_CUDA_FEW", "0") && rows <= kSmallRows && w.steps % kPairSteps == 0 &&
         (w.groups == 1 || w.group_steps % kPairSteps == 0);
}

// Warps of a block: what registers allow. Half of that where there are more blocks than an H200 has multiprocessors, so
// that each has two at a time, of which one begins or ends while the other reads.
constexpr int most_few_warps(int eights) { return eights == 4 ? 12 : 16; }
constexpr int kManyTiles = 132;

// How the stages of a row are dealt out: each warp gets `each`, the first `more` one more.
struct FewParts {
  int each;
  int more;
  int group;        // stages of a full group
  int stage_bytes;  // of shared memory
  int warp_bytes;
};

constexpr int kFewPitch = 36;  // of rows of a warp's sums in shared memory: half a warp writes to different banks

// Adds up what the warps of a block have summed, each in its own part of shared memory, and writes it.
template <bool kHalf, int kEights>
__device__ inline void store_few(const Weight& w, const LinearRows& rows, int warp_bytes,
                                 const float (&total)[2][kEights][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp, g = lane / 4, t = lane % 4;
  struct alignas(8) Two {
    float a, b;
  };
#pragma unroll
  for (int i = 0; i < 4 * kEights; ++i) {
    const int h = i % 2, r = i / 4, j = i / 2 % 2, row = 8 * r + 2 * t + j;
    auto* to = reinterpret_cast<float*>(shared_memory() + warp * warp_bytes) + row * kFewPitch + 16 * h + 2 * g;
    *reinterpret_cast<Two*>(to) = {total[h][r][j], total[h][r][2 + j]};
  }
  sync_block();
  const int count = static_cast<int>(rows.rows) * 32;
  for (int e = static_cast<int>(threadIdx.x); e < count; e += static_cast<int>(blockDim.x)) {
    const uint8_t* from = shared_memory() + (e / 32 * kFewPitch + e % 32) * 4;
    float sum = 0.0f;
    for (int v = 0; v < warps; ++v) sum += *reinterpret_cast<const float*>(from + v * warp_bytes);
    const int64_t output = static_cast<int64_t>(blockIdx.x) * 32 + e % 32;
    if (output < w.n)
      store(rows.y, kHalf ? Type::f16 : Type::bf16, e / 32 * int64_t{w.n} + output, sum + bias_at(rows, output));
  }
}

// Adds the sums of a stage times the scales of its group.
template <int kBits, int kEights>
__device__ inline void add_stage(const GroupBits<kBits>& bits, bool half_scales, const float (&part)[2][kEights][4],
                                 float (&total)[2][kEights][4]) {
  const Type type = half_scales ? Type::f16 : Type::bf16;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float low = value_of(static_cast<uint16_t>(bits.scales[h]), type);
    const float high = value_of(static_cast<uint16_t>(bits.scales[h] >> 16), type);
#pragma unroll
    for (int r = 0; r < kEights; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[h][r][i] = fma_rn(i < 2 ? low : high, part[h][r][i], total[h][r][i]);
  }
}

// What a lane has read of the pairs of a batch.
template <int kBits, int kEights, int kPairs>
struct FewBatch {
  static constexpr int kSize = FewRing<kBits, kEights, kPairs>::kBatch;
  LaneWords<kBits> words[kSize][2];
  FewActivations x[kSize][kEights];

  __device__ FewBatch(const FewPlaces<kBits, kEights, kPairs>& places, const uint8_t* stage, int first) {
#pragma unroll
    for (int p = 0; p < kSize; ++p) {
      for (int odd = 0; odd < 2; ++odd) words[p][odd] = places.words(stage, first + p, odd);
      for (int r = 0; r < kEights; ++r) x[p][r] = places.activations(stage, first + p, r);
    }
  }

  template <bool kHalf>
  __device__ void multiply(const Decoder<kBits, kHalf>& decoder, float (&part)[2][kEights][4]) const {
#pragma unroll
    for (int c = 0; c < 2 * kSize; ++c) {
      uint32_t a[2][4];
      decoder.fragments(words[c / 2][c % 2], a);
#pragma unroll
      for (int i = 0; i < 2 * kEights; ++i) {
        const int h = i % 2, r = i / 2;
        if constexpr (kHalf)
          mma_f16(part[h][r], a[h], x[c / 2][r].chunk[c % 2].b);
        else
          mma_bf16(part[h][r], a[h], x[c / 2][r].chunk[c % 2].b);
      }
    }
  }
};

template <int kBits, bool kHalf, int kEights, int kPairs>
__global__ void __launch_bounds__(most_few_warps(kEights) * kWarp, 1)
    linear_few(Weight w, LinearRows rows, FewParts parts) {
  using Ring = FewRing<kBits, kEights, kPairs>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int first = warp * parts.each + (warp < parts.more ? warp : parts.more);
  const int stages = parts.each + (warp < parts.more ? 1 : 0), count = static_cast<int>(rows.rows);
  const int stage_bytes = parts.stage_bytes;
  const bool half_scales = w.scale_type == Type::f16;
  uint8_t* const ring = shared_memory() + warp * parts.warp_bytes;

  const FewPlaces<kBits, kEights, kPairs> places(count, lane);
  FewFeed<kBits, kEights, kPairs> feed(w, rows.x, rows.pitch, count, parts.group, lane, first);
  feed.fill(places, ring, stage_bytes, stages);
  float total[2][kEights][4] = {};
  int at = 0;  // of the stage, in bytes
  for (int left = stages; left > 0; --left) {
    const int bytes = left > Ring::kStages ? 16 : 0;
    uint8_t* const stage = ring + at;
    GroupBits<kBits> bits = {};
    float part[2][kEights][4] = {};
#pragma unroll
    for (int batch = 0; batch < kPairs; batch += Ring::kBatch) {
      wait_copies<Ring::kBatches - 1>();
      sync_warp();
      if (batch == 0) bits = places.group(stage);
      const FewBatch<kBits, kEights, kPairs> read(places, stage, batch);
      sync_warp();
#pragma unroll
      for (int p = 0; p < Ring::kBatch; ++p) feed.copy(places, stage, batch + p, bytes);
      commit_copies();
      Decoder<kBits, kHalf> decoder;
      decoder.set(bits);
      read.multiply(decoder, part);
    }
    add_stage<kBits>(bits, half_scales, part, total);
    feed.next_stage();
    if constexpr (Ring::kStages == 2)
      at = stage_bytes - at;
    else
      at = at == (Ring::kStages - 1) * stage_bytes ? 0 : at + stage_bytes;
  }
#pragma unroll
  for (int i = 0; i < 8 * kEights; ++i) total[i / 4 % 2][i / 8][i % 4] *= Decoder<kBits, kHalf>::unit(i / 4 % 2);
  wait_copies<0>();
  sync_warp();
  store_few<kHalf>(w, rows, parts.warp_bytes, total);
}

template <int kBits, bool kHalf, int kEights, int kPairs>
int64_t launch_few(void* stream, const Weight& w, const LinearRows& rows) {
  using Ring = FewRing<kBits, kEights, kPairs>;
  constexpr int kUnit = kPairSteps * kPairs;  // steps
  const int stages = w.steps / kUnit, stage_bytes = Ring::stage_bytes(static_cast<int>(rows.rows));
  const int bytes = std::max(Ring::kStages * stage_bytes, 8 * kEights * kFewPitch * 4);
  const int wanted = most_few_warps(kEights) / (w.tiles > kManyTiles && kEights < 4 ? 2 : 1);
  const int warps = std::min({wanted, static_cast<int>(shared_limit()) / bytes, stages});
  const int group = w.groups == 1 ? stages : w.group_steps / kUnit;
  return launch(stream, {w.tiles}, warps * kWarp, int64_t{warps} * bytes, linear_few<kBits, kHalf, kEights, kPairs>, w,
                rows, FewParts{stages / warps, stages % warps, group, stage_bytes, bytes});
}

template <int kBits, bool kHalf, int kEights>
int64_t launch_few(void* stream, const Weight& w, const LinearRows& rows) {
  constexpr int kPairs = kBits == 4 && kEights == 1 ? 4 : 2, kUnit = kPairSteps * kPairs;
  const bool whole = w.steps % kUnit == 0 && (w.groups == 1 || w.group_steps % kUnit == 0);
  return whole ? launch_few<kBits, kHalf, kEights, kPairs>(stream, w, rows)
               : launch_few<kBits, kHalf, kEights, 1>(stream, w, rows);
}

template <int kBits, bool kHalf>
int64_t launch_few(void* stream, const Weight& w, const LinearRows& rows) {
  if (rows.rows <= 8) return launch_few<kBits, kHalf, 1>(stream, w, rows);
  if (rows.rows <= 16) return launch_few<kBits, kHalf, 2>(stream, w, rows);
  return launch_few<kBits, kHalf, 4>(stream, w, rows);
}

}  // namespace awq::cuda
