// A product of one row with weights of 3 bits, in the manner of csrc/kernels/tile-bf16-inl.h, beside one with 4 bits:
// the prototype behind bench_three_bits.py. Needs AVX-512 with VBMI and BF16 (Zen 4, Sapphire Rapids).
//
// Outputs in tiles of 32, channels in steps of 4, groups of whole steps, as in csrc/base/layout.h. Every code is a byte
// 4 j + p(c) of a half step of 16 outputs, with its channels in the order 0, 2, 1, 3. Three ways to hold them:
//
//     Four    64 bytes a step: the codes of outputs 0..15 in the low nibbles, of 16..31 in the high ones
//     Packed  48 bytes a step: 6 bytes for each 8 bytes of a half step, first 8 codes of 3 bits of outputs 0..15, then
//             the 8 of outputs 16..31. One permutation spreads 6 bytes over 8, two multishifts take codes out of them
//     Planes  192 bytes for four steps: two lines of low pairs of bits, a line of high bits, shifted and masked
//
// Scales are bf16, [tile][group][32]; zeros nibbles, [tile][group][16], low ones for outputs 0..15.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kAhead = 10240;

// bf16 of -15 .. 15 by code + 15 - zero
__m512i table() {
  alignas(64) uint16_t words[32] = {};
  for (int i = 0; i < 31; ++i) {
    const float value = static_cast<float>(i - 15);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    words[i] = static_cast<uint16_t>(bits >> 16);
  }
  return _mm512_load_si512(words);
}

struct Offsets {
  __m512i half[2];  // 15 - zero in all bytes of an output's lane

  explicit Offsets(const uint8_t* zeros) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    const __m512i low = _mm512_and_si512(both, _mm512_set1_epi32(15)), bytes = _mm512_set1_epi32(0x01010101);
    const __m512i top = _mm512_set1_epi32(15);
    half[0] = _mm512_mullo_epi32(_mm512_sub_epi32(top, low), bytes);
    half[1] = _mm512_mullo_epi32(_mm512_sub_epi32(top, _mm512_srli_epi32(both, 4)), bytes);
  }
};

// Codes of both halves of a step, a byte each; codes of four steps begin at `p`.
struct Four {
  static constexpr int64_t kBytes = 256;
  static void prefetch(const uint8_t* p) {
    for (int i = 0; i < 4; ++i) __builtin_prefetch(p + kAhead + 64 * i);
  }
  template <int S>
  static void step(const uint8_t* p, __m512i& first, __m512i& second) {
    const __m512i bits = _mm512_loadu_si512(p + 64 * S), mask = _mm512_set1_epi8(15);
    first = _mm512_and_si512(bits, mask);
    second = _mm512_and_si512(_mm512_srli_epi16(bits, 4), mask);
  }
};

struct Packed {
  static constexpr int64_t kBytes = 192;
  static void prefetch(const uint8_t* p) {
    for (int i = 0; i < 3; ++i) __builtin_prefetch(p + kAhead + 64 * i);
  }
  template <int S>
  static void step(const uint8_t* p, __m512i& first, __m512i& second) {
    alignas(64) static const struct Spread {
      uint8_t bytes[64];
      constexpr Spread() : bytes() {
        for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(i / 8 * 6 + (i % 8 < 6 ? i % 8 : 5));
      }
    } spread;
    const __m512i six = _mm512_permutexvar_epi8(_mm512_load_si512(spread.bytes), _mm512_loadu_si512(p + 48 * S));
    const __m512i mask = _mm512_set1_epi8(7);
    first = _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x1512'0f0c'0906'0300), six), mask);
    second = _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2d2a'2724'211e'1b18), six), mask);
  }
};

struct Planes {
  static constexpr int64_t kBytes = 192;
  static void prefetch(const uint8_t* p) { Packed::prefetch(p); }
  template <int S>
  static void step(const uint8_t* p, __m512i& first, __m512i& second) {
    const __m512i low = _mm512_loadu_si512(p + 64 * (S / 2)), high = _mm512_loadu_si512(p + 128);
    first = half<4 * (S % 2), 2 * S>(low, high);
    second = half<4 * (S % 2) + 2, 2 * S + 1>(low, high);
  }
  template <int Low, int High>
  static __m512i half(__m512i low, __m512i high) {
    const __m512i pair = _mm512_and_si512(_mm512_srli_epi16(low, Low), _mm512_set1_epi8(3));
    const __m512i at = High < 2 ? _mm512_slli_epi16(high, 2 - High) : _mm512_srli_epi16(high, High - 2);
    return _mm512_ternarylogic_epi32(pair, at, _mm512_set1_epi8(4), 0xf8);  // pair | (at & 4)
  }
};

template <class Codes, int S>
__attribute__((always_inline)) inline void add_step(const uint8_t* codes, const uint16_t* x, const Offsets& offsets,
                                                    __m512i integers, __m512 (&sums)[4][2]) {
  __m512i half[2];
  Codes::template step<S>(codes, half[0], half[1]);
  int32_t pairs[2];
  std::memcpy(pairs, x + 4 * S, 8);
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const __m512i index = _mm512_add_epi8(half[v], offsets.half[v]);
    const __m512i even = _mm512_permutexvar_epi16(index, integers);
    const __m512i odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 8), integers);
    __m512* to = &sums[2 * (S % 2)][v];
    to[0] = _mm512_dpbf16_ps(to[0], (__m512bh)even, (__m512bh)_mm512_set1_epi32(pairs[0]));
    to[2] = _mm512_dpbf16_ps(to[2], (__m512bh)odd, (__m512bh)_mm512_set1_epi32(pairs[1]));
  }
}

template <class Codes>
void tile(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const uint16_t* x, float* y,
          int64_t groups, int64_t group) {
  const __m512i integers = table();
  __m512 total[2] = {};
  for (int64_t g = 0; g < groups; ++g, scales += 32, zeros += 16) {
    const Offsets offsets(zeros);
    __m512 sums[4][2] = {};
    __builtin_prefetch(scales + 128);
    __builtin_prefetch(zeros + 64);
    for (int64_t k = 0; k < group; k += 16, codes += Codes::kBytes, x += 16) {
      Codes::prefetch(codes);
      add_step<Codes, 0>(codes, x, offsets, integers, sums);
      add_step<Codes, 1>(codes, x, offsets, integers, sums);
      add_step<Codes, 2>(codes, x, offsets, integers, sums);
      add_step<Codes, 3>(codes, x, offsets, integers, sums);
    }
    for (int v = 0; v < 2; ++v) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 16 * v));
      const __m512 scale = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
      const __m512 sum = sums[0][v] + sums[1][v] + (sums[2][v] + sums[3][v]);
      total[v] = _mm512_fmadd_ps(sum, scale, total[v]);
    }
  }
  for (int v = 0; v < 2; ++v) _mm512_storeu_ps(y + 16 * v, total[v]);
}

// The same with an input of int8, channels of a step in the order 0, 2, 1, 3, and its sum over each group.
template <class Codes, int S>
__attribute__((always_inline)) inline void add_step_int8(const uint8_t* codes, const int8_t* x, __m512i (&sums)[4][2]) {
  __m512i half[2];
  Codes::template step<S>(codes, half[0], half[1]);
  int32_t four;
  std::memcpy(&four, x + 4 * S, 4);
  for (int v = 0; v < 2; ++v) sums[S][v] = _mm512_dpbusd_epi32(sums[S][v], half[v], _mm512_set1_epi32(four));
}

template <class Codes>
void tile_int8(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const int8_t* x,
               const int32_t* x_sums, float* y, int64_t groups, int64_t group) {
  __m512 total[2] = {};
  for (int64_t g = 0; g < groups; ++g, scales += 32, zeros += 16) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    const __m512i zero[2] = {_mm512_and_si512(both, _mm512_set1_epi32(15)), _mm512_srli_epi32(both, 4)};
    __m512i sums[4][2] = {};
    __builtin_prefetch(scales + 128);
    __builtin_prefetch(zeros + 64);
    for (int64_t k = 0; k < group; k += 16, codes += Codes::kBytes, x += 16) {
      Codes::prefetch(codes);
      add_step_int8<Codes, 0>(codes, x, sums);
      add_step_int8<Codes, 1>(codes, x, sums);
      add_step_int8<Codes, 2>(codes, x, sums);
      add_step_int8<Codes, 3>(codes, x, sums);
    }
    for (int v = 0; v < 2; ++v) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 16 * v));
      const __m512 scale = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
      const __m512i sum =
          _mm512_add_epi32(_mm512_add_epi32(sums[0][v], sums[1][v]), _mm512_add_epi32(sums[2][v], sums[3][v]));
      const __m512i shift = _mm512_mullo_epi32(zero[v], _mm512_set1_epi32(x_sums[g]));
      total[v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, shift)), scale, total[v]);
    }
  }
  for (int v = 0; v < 2; ++v) _mm512_storeu_ps(y + 16 * v, total[v]);
}

template <class Codes>
void product_int8(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const int8_t* x,
                  const int32_t* x_sums, float* y, int64_t n, int64_t k, int64_t group) {
  const int64_t groups = k / group;
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < n / 32; ++t)
    tile_int8<Codes>(codes + t * (k / 16) * Codes::kBytes, scales + t * groups * 32, zeros + t * groups * 16, x, x_sums,
                     y + 32 * t, groups, group);
}

template <class Codes>
void product(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const uint16_t* x, float* y, int64_t n,
             int64_t k, int64_t group) {
  const int64_t groups = k / group;
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < n / 32; ++t)
    tile<Codes>(codes + t * (k / 16) * Codes::kBytes, scales + t * groups * 32, zeros + t * groups * 16, x, y + 32 * t,
                groups, group);
}

}  // namespace

// codes: as above, with 64 readable bytes behind them; x: bf16 [k]; y: fp32 [n]; n % 32 = 0, k % group = group % 16 =
// 0.
extern "C" void four_bits(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const uint16_t* x,
                          float* y, int64_t n, int64_t k, int64_t group) {
  product<Four>(codes, scales, zeros, x, y, n, k, group);
}
extern "C" void packed(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const uint16_t* x, float* y,
                       int64_t n, int64_t k, int64_t group) {
  product<Packed>(codes, scales, zeros, x, y, n, k, group);
}
extern "C" void planes(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const uint16_t* x, float* y,
                       int64_t n, int64_t k, int64_t group) {
  product<Planes>(codes, scales, zeros, x, y, n, k, group);
}
extern "C" void four_bits_int8(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const int8_t* x,
                               const int32_t* x_sums, float* y, int64_t n, int64_t k, int64_t group) {
  product_int8<Four>(codes, scales, zeros, x, x_sums, y, n, k, group);
}
extern "C" void packed_int8(const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, const int8_t* x,
                            const int32_t* x_sums, float* y, int64_t n, int64_t k, int64_t group) {
  product_int8<Packed>(codes, scales, zeros, x, x_sums, y, n, k, group);
}
