// What a block of the kernel for Hopper (linear_wgmma.cu) has in shared memory, and what a lane reads of it.
#pragma once

#include "cuda/hopper.h"
#include "cuda/tiles.h"

namespace awq::cuda {

constexpr int kStageChannels = 64, kStageSteps = 16, kBlockTiles = 4, kRing = 6;
// Two warpgroups multiply, one copies. All start with 168 registers a thread, as many as 384 threads can have; then the
// copying one gives most of its own to the others: 2 * 240 + 24 = 3 * 168.
constexpr int kMultiplyWarps = 8, kBlockThreads = 3 * kGroupThreads;
constexpr int kMultiplyRegisters = 240, kCopyRegisters = 24;

// The rows of x are 128 bytes long, as are steps of 8 bits. A box must begin at a multiple of 1024, which all sizes
// here are.
template <int kBits, int kRows>
struct Stage {
  uint8_t x[kRows * 2 * kStageChannels];
  uint8_t codes[kBlockTiles][kStageSteps * 16 * kBits];
};

template <int kBits, int kRows>
struct Shared {
  Stage<kBits, kRows> stages[kRing];
  Barrier full[kRing];   // a stage has come
  Barrier empty[kRing];  // all warps have multiplied it

  // Shared memory need not begin at a multiple of 1024.
  static constexpr int64_t bytes() { return int64_t{sizeof(Shared)} + 1024 - 16; }
  static __device__ Shared& here() {
    unsigned char* begin = shared_memory();
    return *reinterpret_cast<Shared*>(begin + (0 - shared_address(begin)) % 1024);
  }
};

// What a lane reads of a tile. It has half `half` of the outputs, 2 pair and 2 pair + 1 of these in rows g and g + 8 of
// A. Of 4 bits pair is g. Of 8 bits, whose steps are 128 bytes, swizzled, it is 0, 1, 4, 5 for g = 0 .. 3: then half a
// warp, which reads these of two steps at a time, finds them in different banks.
template <int kBits>
struct Lane {
  int half, pair;
  uint32_t places[kBits == 4 ? 1 : 4];  // of its words in steps 0, 2, 4 and 6; of 4 bits the others follow the first
  uint32_t bytes;                       // of them that it takes
  uint32_t mask;                        // of its codes in their halves of a word

  __device__ explicit Lane(int half_of_tile) : half(half_of_tile) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
    pair = kBits == 4 ? g : (g & 1) | (g & 2) << 1 | (g & 4) >> 1;
    bytes = t % 2 == 0 ? 0x6240 : 0x7351;
    mask = Decoder<kBits, true>::mask(half);
    if constexpr (kBits == 4) {
      places[0] = static_cast<uint32_t>(t / 2 * 64 + 8 * pair);
    } else {
      for (int i = 0; i < 4; ++i) {
        const int step = 2 * i + t / 2, piece = (4 * half + pair / 2) ^ step;  // of 16 bytes
        places[i] = static_cast<uint32_t>(step * 128 + 16 * piece + 8 * (pair % 2));
      }
    }
  }

  // Its words in step 2 i or 2 i + 1.
  __device__ LaneWords<4> load(const uint8_t* codes, int i) const {
    if constexpr (kBits == 4)
      return load_words<4>(codes + places[0] + 128 * i);
    else
      return load_words<4>(codes + places[i % 4] + 1024 * (i / 4));
  }

  // The fragment of A of 16 channels. Its columns 2t, 2t + 1 are channels of step t / 2, columns 2t + 8, 2t + 9 of step
  // 2 + t / 2, the even bytes of words or the odd ones: x is read from memory, in the order of its channels, so a lane
  // cannot choose them as in tiles.h.
  template <bool kHalf>
  __device__ void decode(const uint8_t* codes, int product, const uint32_t (&zero)[2], uint32_t (&a)[4]) const {
    const LaneWords<4> low = load(codes, 2 * product), high = load(codes, 2 * product + 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = pick_bytes(low.w[i], high.w[i], bytes);
      a[i] = Decoder<kBits, kHalf>::pair(word, mask, zero[i]);
      a[2 + i] = Decoder<kBits, kHalf>::pair(word >> 8, mask, zero[i]);
    }
  }
};

// Scales and zeros of a lane's two outputs, as they lie in memory. They are read long before they are used, and again
// with every batch: so no branch stands between a load and its use, at whose end the compiler would wait for it.
template <int kBits>
struct LaneGroup {
  const uint16_t* scales_at;
  const uint8_t* zeros_at;
  uint32_t scales, zeros, mask;

  __device__ LaneGroup(const Weight& w, int tile, int group, const Lane<kBits>& lane) {
    const int64_t at = static_cast<int64_t>(tile) * w.groups + group;
    const int output = 16 * lane.half + 2 * lane.pair;
    scales_at = w.scales + at * 32 + output;
    zeros_at = w.zeros + at * 4 * kBits + (kBits == 4 ? 2 * lane.pair : output);
    mask = lane.mask;
  }
  __device__ void load() {
    scales = *reinterpret_cast<const uint32_t*>(scales_at);
    zeros = *reinterpret_cast<const uint16_t*>(zeros_at);
  }
  __device__ void next() {
    scales_at += 32;
    zeros_at += 4 * kBits;
  }
  template <bool kHalf>
  __device__ void zero(uint32_t (&out)[2]) const {
    for (int i = 0; i < 2; ++i) out[i] = Decoder<kBits, kHalf>::negative(zeros, i, mask);
  }
};

}  // namespace awq::cuda
