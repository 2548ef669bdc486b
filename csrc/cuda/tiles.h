// The compute layout of base/layout.h as the tensor cores read it.
//
// A product m16n8k16 takes 16 outputs and 16 channels of the weight as its matrix A, and 8 rows of activations as B.
// Which output is which row of A, and which channel which column, is free as long as B and C agree. So lane l = 4 g + t
// of a warp takes step t of four, words 2g and 2g + 1 of it (8 bytes; the warp's are 256 bytes in a row): they hold
// channels 4t .. 4t + 3 of outputs 2g, 2g + 1 (low nibbles) and 16 + 2g, 16 + 2g + 1 (high ones), the fragments of A of
// two products. Rows g and g + 8 of A are outputs 2g and 2g + 1, columns 2t, 2t + 1, 2t + 8, 2t + 9 channels 4t .. 4t
// + 3. In a word channels 0 and 1 are in even bytes, 2 and 3 in odd ones: pairs in the halves of a word, as A has them.
// So the layout that the CPU reads serves a GPU as it is.
#pragma once

#include "base/layout.h"
#include "cuda/device.h"

namespace awq::cuda {

struct Weight {
  const uint8_t* codes;    // [T][S][16 bits]
  const uint16_t* scales;  // [T][G][32]
  const uint8_t* zeros;    // [T][G][4 bits]
  Type scale_type;
  int n;
  int k;
  int group;        // channels in a full group
  int groups;       // in a row
  int group_steps;  // in a full group
  int steps;        // in a row
  int tiles;
};

inline Weight make_weight(const void* codes, const void* scales, int64_t scale_type, const void* zeros, int64_t n,
                          int64_t k, int64_t group) {
  return {static_cast<const uint8_t*>(codes),
          static_cast<const uint16_t*>(scales),
          static_cast<const uint8_t*>(zeros),
          static_cast<Type>(scale_type),
          static_cast<int>(n),
          static_cast<int>(k),
          static_cast<int>(group),
          static_cast<int>(ceil_div(k, group)),
          static_cast<int>(ceil_div(group, 4)),
          static_cast<int>(step_count(k, group)),
          static_cast<int>(tile_count(n))};
}

// Steps of group i, which may be the short last one.
__device__ inline int steps_of(const Weight& w, int i) {
  const int left = w.steps - i * w.group_steps;
  return left < w.group_steps ? left : w.group_steps;
}

// The words of one lane: its two of a step for 4 bits, and for 8 bits words 2g, 2g + 1, 16 + 2g, 17 + 2g.
template <int kBits>
struct LaneWords {
  uint32_t w[kBits / 2];
};

// `first` points to the lane's first two, in global or shared memory; those of 8 bits lie in two rows of kPitch bytes.
template <int kBits, int kPitch = 64>
__device__ inline LaneWords<kBits> load_words(const uint8_t* first) {
  struct alignas(8) Pair {
    uint32_t a, b;
  };
  LaneWords<kBits> out;
  for (int v = 0; v < kBits / 4; ++v) {
    const Pair pair = *reinterpret_cast<const Pair*>(first + kPitch * v);
    out.w[2 * v] = pair.a;
    out.w[2 * v + 1] = pair.b;
  }
  return out;
}

// Scales and zeros of the lane's four outputs in one group, as they lie in memory.
template <int kBits>
struct GroupBits {
  uint32_t scales[2];         // of outputs 2g, 2g + 1 and of 16 + 2g, 17 + 2g
  uint32_t zeros[kBits / 4];  // two bytes each

  __device__ void read(const Weight& w, int tile, int group, int g) {
    const int64_t at = static_cast<int64_t>(tile) * w.groups + group;
    for (int h = 0; h < 2; ++h) scales[h] = *reinterpret_cast<const uint32_t*>(w.scales + at * 32 + 16 * h + 2 * g);
    for (int v = 0; v < kBits / 4; ++v)
      zeros[v] = *reinterpret_cast<const uint16_t*>(w.zeros + at * 4 * kBits + 16 * v + 2 * g);
  }

  __device__ float scale(const Weight& w, int h, int i) const {
    return value_of(static_cast<uint16_t>(scales[h] >> (16 * i)), w.scale_type);
  }
};

// From codes to code - zero times a power of two, exactly. With no exponent bits above it an integer is a float too:
// 2^-24 (fp16) or 2^-133 (bf16) for each 1, up to 2047 or 255. So codes in bits 0 .. 3, 4 .. 7 and 0 .. 7 of a half
// word need no shift, and one fma brings them to a usual size and takes the zero away.
template <int kBits, bool kHalf>
struct Decoder {
  static constexpr uint32_t kFactor = kHalf ? 0x78007800u : 0x7f007f00u;  // 2^15, 2^127; twice
  uint32_t zero[2][2];                                                    // of output 16 h + 2g + i, as negative() says

  // What sums for outputs 16 h .. are to be multiplied by at the end.
  static constexpr float unit(int h) { return (kHalf ? 512.0f : 64.0f) / (kBits == 4 && h == 1 ? 16.0f : 1.0f); }
  static constexpr uint32_t mask(int h) { return kBits == 8 ? 0x00ff00ffu : h == 0 ? 0x000f000fu : 0x00f000f0u; }

  static __device__ uint32_t fma(uint32_t a, uint32_t factor, uint32_t b) {
    return kHalf ? fma_half2(a, factor, b) : fma_bf16x2(a, factor, b);
  }

  // -zero of byte i of two, in both halves of a word.
  static __device__ uint32_t negative(uint32_t bytes, int i, uint32_t mask) {
    return fma(pick_bytes(bytes, 0, i == 0 ? 0x4040u : 0x4141u) & mask, kFactor | 0x80008000u, 0);
  }
  // The codes in the halves of a word, less a zero that negative() has made.
  static __device__ uint32_t pair(uint32_t word, uint32_t mask, uint32_t z) { return fma(word & mask, kFactor, z); }

  __device__ void set(const GroupBits<kBits>& bits) {
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < 2; ++i) zero[h][i] = negative(bits.zeros[kBits == 4 ? 0 : h], i, mask(h));
  }

  // The fragments of A of both halves of a tile.
  __device__ void fragments(const LaneWords<kBits>& words, uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = words.w[kBits == 4 ? i : 2 * h + i];
        a[h][i] = pair(word, mask(h), zero[h][i]);
        a[h][2 + i] = pair(word >> 8, mask(h), zero[h][i]);
      }
  }
};

// Eight bytes of a row of activations: the fragment of B for the lane's four channels.
struct alignas(8) Activations {
  uint32_t b[2];
};

// The sums of a lane for 32 outputs and 8 kEights rows, fragments of C: [h][r][i] belongs to output 16 h + 2g + i / 2
// and row 8 r + 2t + i % 2.
template <int kEights>
struct LaneSums {
  float total[2][kEights][4] = {};
  float part[2][kEights][4] = {};  // of the group that is being added up, without its scale

  template <bool kHalf>
  __device__ void multiply(const uint32_t (&a)[2][4], int r, const Activations& x) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (kHalf)
        mma_f16(part[h][r], a[h], x.b);
      else
        mma_bf16(part[h][r], a[h], x.b);
    }
  }

  template <int kBits>
  __device__ void end_group(const Weight& w, const GroupBits<kBits>& bits) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float low = bits.scale(w, h, 0), high = bits.scale(w, h, 1);
#pragma unroll
      for (int r = 0; r < kEights; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[h][r][i] = fma_rn(i < 2 ? low : high, part[h][r][i], total[h][r][i]);
          part[h][r][i] = 0.0f;
        }
    }
  }

  // Brings the sums of all groups to their size: those of products of codes that Decoder has made.
  template <class Decoder>
  __device__ void finish() {
#pragma unroll
    for (int i = 0; i < 8 * kEights; ++i) total[i / 4 % 2][i / 8][i % 4] *= Decoder::unit(i / 4 % 2);
  }
};

}  // namespace awq::cuda
