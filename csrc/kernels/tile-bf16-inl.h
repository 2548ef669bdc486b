// The products of tile-inl.h on pairs of bf16. With 4 bits code - zero is one of 31 integers, so one permutation of
// words, from a table of bf16 in one register, decodes a whole register of codes: index = code + 15 - zero. With 8 bits
// it is decoded to fp32, which has nothing below the sixteen bits of bf16, and two such registers are joined.

#if defined(AWQ_LEVEL_BF16)

// One step: [channel pair][outputs 0..15, 16..31].
struct StepBf16 {
  __m512bh w[2][2];
};

template <int Bits>
struct CodesBf16;

template <>
struct CodesBf16<4> {
  const uint8_t* codes;
  __m512i offset[2];  // 15 - zero in every byte of an output's lane

  CodesBf16(const uint8_t* codes, const uint8_t* zeros) : codes(codes) {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    const __m512i low = _mm512_and_si512(both, _mm512_set1_epi32(15)), bytes = _mm512_set1_epi32(0x01010101);
    const __m512i top = _mm512_set1_epi32(15);
    offset[0] = _mm512_mullo_epi32(_mm512_sub_epi32(top, low), bytes);
    offset[1] = _mm512_mullo_epi32(_mm512_sub_epi32(top, _mm512_srli_epi32(both, 4)), bytes);
  }
  __attribute__((always_inline)) StepBf16 step(int64_t s) const {
    // bf16 of -15 .. 15
    const __m512i table = _mm512_set_epi16(
        0x0000, 0x4170, 0x4160, 0x4150, 0x4140, 0x4130, 0x4120, 0x4110, 0x4100, 0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040,
        0x4000, 0x3f80, 0x0000, static_cast<short>(0xbf80), static_cast<short>(0xc000), static_cast<short>(0xc040),
        static_cast<short>(0xc080), static_cast<short>(0xc0a0), static_cast<short>(0xc0c0), static_cast<short>(0xc0e0),
        static_cast<short>(0xc100), static_cast<short>(0xc110), static_cast<short>(0xc120), static_cast<short>(0xc130),
        static_cast<short>(0xc140), static_cast<short>(0xc150), static_cast<short>(0xc160), static_cast<short>(0xc170));
    prefetch(codes + s * 64 + kAheadBytes);
    const __m512i bits = _mm512_loadu_si512(codes + s * 64), mask = _mm512_set1_epi16(0x0f0f);
    const __m512i even = _mm512_add_epi16(_mm512_and_si512(bits, mask), offset[0]);
    const __m512i odd = _mm512_add_epi16(_mm512_and_si512(_mm512_srli_epi16(bits, 4), mask), offset[1]);
    return {{{(__m512bh)_mm512_permutexvar_epi16(even, table), (__m512bh)_mm512_permutexvar_epi16(odd, table)},
             {(__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(even, 8), table),
              (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 8), table)}}};
  }
};

// The lowest byte below the exponent of 2^23, and the next one below that of 2^15, both have a code's units in place.
template <>
struct CodesBf16<8> {
  const uint8_t* codes;
  __m512 zero[2][2];  // [outputs 0..15, 16..31][2^23 + zero, 2^15 + zero]

  CodesBf16(const uint8_t* codes, const uint8_t* zeros) : codes(codes) {
    for (int v = 0; v < 2; ++v) {
      const __m512i bytes = (__m512i)load_bytes(zeros + v * 16);
      zero[v][0] = low_byte(bytes);
      zero[v][1] = next_byte(_mm512_slli_epi32(bytes, 8));
    }
  }
  __attribute__((always_inline)) StepBf16 step(int64_t s) const {
    StepBf16 step;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const uint8_t* half = codes + s * 128 + v * 64;
      prefetch(half + kAheadBytes);
      const __m512i bits = _mm512_loadu_si512(half), upper = _mm512_srli_epi32(bits, 16);
      step.w[0][v] = pair(_mm512_sub_ps(low_byte(bits), zero[v][0]), _mm512_sub_ps(low_byte(upper), zero[v][0]));
      step.w[1][v] = pair(_mm512_sub_ps(next_byte(bits), zero[v][1]), _mm512_sub_ps(next_byte(upper), zero[v][1]));
    }
    return step;
  }
  // bits & mask | exponent
  static __m512 low_byte(__m512i bits) {
    const __m512i mask = _mm512_set1_epi32(0xff), exponent = _mm512_set1_epi32(0x4b000000);
    return (__m512)_mm512_ternarylogic_epi32(bits, mask, exponent, 0xea);
  }
  static __m512 next_byte(__m512i bits) {
    const __m512i mask = _mm512_set1_epi32(0xff00), exponent = _mm512_set1_epi32(0x47000000);
    return (__m512)_mm512_ternarylogic_epi32(bits, mask, exponent, 0xea);
  }
  // The upper halves of both, `first` in the lower one.
  static __m512bh pair(__m512 first, __m512 second) {
    return (__m512bh)_mm512_or_si512(_mm512_srli_epi32((__m512i)first, 16), (__m512i)second);
  }
};

// With few rows a sum would have to wait for the one before it. Each pair of a step therefore has its own sums; with a
// single row, each pair of two steps.
template <int R>
constexpr int kChains = R == 1   ? 4
                        : R <= 4 ? 2
                                 : 1;

template <int R>
struct SumsBf16 {
  __m512 sum[kChains<R>][R][2] = {};

  __attribute__((always_inline)) void add(const StepBf16& step, const uint16_t* a, int chain) {
#pragma GCC unroll 2
    for (int p = 0; p < 2; ++p)
#pragma GCC unroll 16
      for (int m = 0; m < R; ++m) {
        int32_t pair;
        __builtin_memcpy(&pair, a + (p * R + m) * 2, 4);
        const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
        __m512* to = sum[(chain + p) % kChains<R>][m];
        to[0] = _mm512_dpbf16_ps(to[0], step.w[p][0], factor);
        to[1] = _mm512_dpbf16_ps(to[1], step.w[p][1], factor);
      }
  }
};

template <int R, class Source>
__attribute__((always_inline)) inline void add_group_bf16(const Source& source, int64_t steps, const uint16_t* a,
                                                          const uint16_t* scales, Dtype dtype, float* y, int64_t ldy) {
  SumsBf16<R> sums;
  int64_t s = 0;
  for (; s + 2 <= steps; s += 2, a += 8 * R) {
    sums.add(source.step(s), a, 0);
    sums.add(source.step(s + 1), a + 4 * R, 2);
  }
  if (s < steps) sums.add(source.step(s), a, 0);
#pragma GCC unroll 4
  for (int c = 1; c < kChains<R>; ++c)
#pragma GCC unroll 4
    for (int m = 0; m < R; ++m)
      for (int v = 0; v < 2; ++v) sums.sum[0][m][v] += sums.sum[c][m][v];
  add_scaled(sums.sum[0], scales, dtype, 0, y, ldy);
}

template <int Bits, int R>
void dot_bf16_rows(const WeightBlock* block, const uint16_t* a, float* y, int64_t ldy) {
  const uint8_t* codes = block->codes;
  for (int64_t g = 0; g < block->groups; ++g) {
    const int64_t steps = g + 1 < block->groups ? block->group_steps : block->last_steps;
    prefetch(block->scales + (g + kAheadGroups) * 32);
    prefetch(block->zeros + (g + kAheadGroups) * kZeroBytes<Bits>);
    const CodesBf16<Bits> source(codes, block->zeros + g * kZeroBytes<Bits>);
    add_group_bf16<R>(source, steps, a, block->scales + g * 32, block->scale_dtype, y, ldy);
    codes += steps * kStepBytes<Bits>;
    a += steps * 4 * R;
  }
}

void dot_bf16(const WeightBlock* block, const uint16_t* a, int rows, float* y, int64_t ldy) {
  for_bits(block->bits, [&](auto b) {
    for_rows<kDotRows>(rows, [&](auto r) { dot_bf16_rows<b.count, r.count>(block, a, y, ldy); });
  });
}

#else
constexpr decltype(KernelTable::dot_bf16) dot_bf16 = nullptr;
#endif
