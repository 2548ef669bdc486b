// Products of tile-inl.h on pairs of bf16, weights decoded as decode-bf16-inl.h does.

#if defined(AWQ_LEVEL_BF16)

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
        to[0] = _mm512_dpbf16_ps(to[0], (__m512bh)step.w[p][0], factor);
        to[1] = _mm512_dpbf16_ps(to[1], (__m512bh)step.w[p][1], factor);
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
