// The parts of linear_few.h: a warp's ring in shared memory, what is copied into it and read from it.
#pragma once

#include "cuda/tiles.h"

namespace awq::cuda {

constexpr int kPairSteps = 8;

// A ring is cut into stages: codes of kPairs pairs; scales and zeros, 64 bytes and 4 kBits, of their group; and x
// [rows][kPairs][32]. With one eight of rows only those that exist take room, else all.
template <int kBits, int kEights, int kPairs>
struct FewRing {
  static constexpr int kDepth = kBits == 8 ? 4 : kEights == 1 ? 8 : 6;  // pairs
  static constexpr int kStages = kDepth / kPairs;
  static constexpr int kBatch = kPairs < 2 ? kPairs : 2;  // pairs that are waited for, read and replaced together
  static constexpr int kBatches = kDepth / kBatch;
  static constexpr int kCodes = 128 * kBits, kRow = 64 * kPairs;  // bytes of a pair, of a row of x
  static constexpr int kGroup = kPairs * kCodes, kX = kGroup + 96;

  static constexpr int stage_bytes(int rows) { return kX + (kEights == 1 ? rows : 8 * kEights) * kRow; }
  // Piece `piece` of a row of x in even or odd pairs of a stage. They are exchanged in odd rows: eight lanes read two
  // rows at a time, which so are in different banks.
  static constexpr int x_place(int row, int piece, int odd) {
    return kX + row * kRow + (kPairs == 1 ? 0 : 64 * (odd ^ row % 2)) + 16 * piece;
  }
  // Added to that for pair p of a stage, rows 8 r ..
  static constexpr int x_from(int p, int r) { return p / 2 * 128 + r * 8 * kRow; }
  // Piece `quarter` of a step of 64 bytes in the 512 of a pair. The eight pieces that eight lanes copy at a time are in
  // different banks, and so are the eight that sixteen lanes read.
  static constexpr int code_place(int step, int quarter) {
    const int odd = step % 2, t = step / 2, high = quarter / 2;
    return 256 * odd + 128 * high + 64 * (t / 2 ^ odd) + 32 * (t % 2 ^ high) + 16 * (quarter % 2);
  }
};

struct alignas(16) FewActivations {
  Activations chunk[2];
};

// Where a lane's pieces lie in a stage: those that it copies, and those that it reads.
template <int kBits, int kEights, int kPairs>
struct FewPlaces {
  using Ring = FewRing<kBits, kEights, kPairs>;
  int to_codes, to_group;
  int codes[2], x[2], scales, zeros;  // x is copied by the lane that reads it

  __device__ FewPlaces(int rows, int lane) {
    const int g = lane / 4, t = lane % 4;
    to_codes = Ring::code_place(g, t);
    to_group = Ring::kGroup + 16 * lane;
    // With one eight, lanes of rows that do not exist read row 0, which takes no time. Of more eights such lanes read
    // what happens to be there: it reaches sums of these rows alone.
    const int row = kEights > 1 || g < rows ? g : 0;
    for (int odd = 0; odd < 2; ++odd) {
      codes[odd] = Ring::code_place(2 * t + odd, g / 2) + g % 2 * 8;
      x[odd] = Ring::x_place(row, t, odd);
    }
    scales = Ring::kGroup + 4 * g;
    zeros = Ring::kGroup + 64 + 2 * g;
  }

  __device__ LaneWords<kBits> words(const uint8_t* stage, int p, int odd) const {
    return load_words<kBits, 512>(stage + codes[odd] + p * Ring::kCodes);
  }

  __device__ FewActivations activations(const uint8_t* stage, int p, int r) const {
    return *reinterpret_cast<const FewActivations*>(stage + x[p % 2] + Ring::x_from(p, r));
  }

  __device__ GroupBits<kBits> group(const uint8_t* stage) const {
    GroupBits<kBits> bits;
    for (int h = 0; h < 2; ++h) bits.scales[h] = *reinterpret_cast<const uint32_t*>(stage + scales + 32 * h);
    for (int v = 0; v < kBits / 4; ++v) bits.zeros[v] = *reinterpret_cast<const uint16_t*>(stage + zeros + 16 * v);
    return bits;
  }
};

// What a warp copies. Each lane has pieces of 16 bytes: of codes one of each 512 bytes, of x one of each eight rows,
// and lanes 0 .. 3 of scales, 4 .. of zeros.
template <int kBits, int kEights, int kPairs>
struct FewFeed {
  using Ring = FewRing<kBits, kEights, kPairs>;
  using Places = FewPlaces<kBits, kEights, kPairs>;
  const uint8_t* codes;
  const uint16_t* x[kEights];
  const uint8_t* group;
  int group_stages, left;  // stages of a group, and of this one
  bool there[kEights], of_scales, of_group;

  __device__ FewFeed(const Weight& w, const uint16_t* rows, int64_t pitch, int count, int stages, int lane, int stage)
      : group_stages(stages) {
    const int row = lane / 4, piece = lane % 4, first = stage / stages, pair = stage * kPairs;
    const int64_t tile = blockIdx.x;
    codes = w.codes + (tile * w.steps + kPairSteps * pair + row) * (16 * kBits) + 16 * piece;
    for (int r = 0; r < kEights; ++r) {
      there[r] = 8 * r + row < count;
      x[r] = rows + (there[r] ? 8 * r + row : 0) * pitch + 32 * int64_t{pair} + 8 * piece;
    }
    of_group = lane < 4 + kBits / 4;
    of_scales = lane < 4;
    group = of_scales ? reinterpret_cast<const uint8_t*>(w.scales) : w.zeros;
    group += (tile * w.groups + first) * group_bytes() + 16 * (lane % 4);
    left = stages - (stage - first * stages);
  }

  __device__ int group_bytes() const { return of_scales ? 64 : 4 * kBits; }

  // Copies pair p of the coming stage; with 0 bytes nothing is read.
  __device__ void copy(const Places& to, uint8_t* stage, int p, int bytes) {
#pragma unroll
    for (int v = 0; v < kBits / 4; ++v)
      copy16(stage + to.to_codes + p * Ring::kCodes + 512 * v, codes + p * Ring::kCodes + 64 * v, bytes);
#pragma unroll
    for (int r = 0; r < kEights; ++r)
      copy16_if(there[r], stage + to.x[p % 2] + Ring::x_from(p, r), x[r] + 32 * p, bytes);
    if (p == 0) copy16_if(of_group, stage + to.to_group, group, bytes);
  }

  // Begins a ring for `stages` stages.
  __device__ void fill(const Places& to, uint8_t* ring, int stage_bytes, int stages) {
#pragma unroll
    for (int s = 0; s < Ring::kStages; ++s) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        copy(to, ring + s * stage_bytes, p, s < stages ? 16 : 0);
        if (p % Ring::kBatch == Ring::kBatch - 1) commit_copies();
      }
      next_stage();
    }
  }

  __device__ void next_stage() {
    codes += kPairs * Ring::kCodes;
#pragma unroll
    for (int r = 0; r < kEights; ++r) x[r] += kPairs * 32;
    group += left == 1 ? group_bytes() : 0;
    left = left == 1 ? group_stages : left - 1;
  }
};

}  // namespace awq::cuda
