// The products of tile-inl.h with activations in eight bits. Each 32-bit lane of a step's codes holds four channels of
// one output, in the order 0, 2, 1, 3. Codes of 8 bits are read as they are, those of 4 after a mask and a shift of a
// whole register; then one instruction computes four byte products per lane. The zero point enters once per run, in the
// value that the sums start from.

#if !defined(AWQ_LEVEL_AVX512) && !defined(AWQ_LEVEL_AVX2)
typedef int16_t VecShort __attribute__((vector_size(4 * kLanes)));
#endif

// The lower plus the upper half of each lane, both signed.
inline VecInt halves(VecInt v) { return (v << 16 >> 16) + (v >> 16); }

inline VecInt splat_int(int32_t x) { return x + VecInt{}; }

// sum + four products per lane: bytes of w below 2^Bits, bytes of a from -127 to 127. For 4 bits the sum of two
// products fits 16 bits; for 8 bits only one does, so bytes are widened first.
template <int Bits>
inline VecInt dot_bytes(VecInt sum, VecInt w, VecInt a) {
#if defined(AWQ_LEVEL_VNNI)
  return (VecInt)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)a);
#elif defined(AWQ_LEVEL_AVX512)
  if constexpr (Bits == 8) {
    const __m512i even = _mm512_and_si512((__m512i)w, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16((__m512i)w, 8);
    const __m512i x = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)a, 8), 8), y = _mm512_srai_epi16((__m512i)a, 8);
    return sum + (VecInt)_mm512_madd_epi16(even, x) + (VecInt)_mm512_madd_epi16(odd, y);
  }
  const __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)a);
  return sum + (VecInt)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#elif defined(AWQ_LEVEL_AVX2)
  if constexpr (Bits == 8) {
    const __m256i even = _mm256_and_si256((__m256i)w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16((__m256i)w, 8);
    const __m256i x = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)a, 8), 8), y = _mm256_srai_epi16((__m256i)a, 8);
    return sum + (VecInt)_mm256_madd_epi16(even, x) + (VecInt)_mm256_madd_epi16(odd, y);
  }
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)a);
  return sum + (VecInt)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  const VecShort even = (VecShort)(w & 0x00ff00ff), odd = (VecShort)(w >> 8 & 0x00ff00ff), bytes = (VecShort)a;
  const VecShort x = even * (bytes << 8 >> 8), y = odd * (bytes >> 8);
  if constexpr (Bits == 8) return sum + halves((VecInt)x) + halves((VecInt)y);
  return sum + halves((VecInt)(x + y));
#endif
}

inline Vec to_floats(VecInt v) { return __builtin_convertvector(v, Vec); }

// The codes or zeros of the outputs j and 16 + j, in two registers. Of codes the bytes are used, of zeros the lanes.
template <int Bits>
__attribute__((always_inline)) inline void load_codes(const uint8_t* codes, VecInt (&w)[2]) {
  prefetch(codes + kAheadBytes);
  if constexpr (Bits == 8) {
    prefetch(codes + 64 + kAheadBytes);
    w[0] = load_ints(codes);
    w[1] = load_ints(codes + 64);
  } else {
    const VecInt bits = load_ints(codes), low = splat_int(0x0f0f0f0f);
    w[0] = bits & low;
    w[1] = bits >> 4 & low;
  }
}

template <int Bits>
inline void load_zeros(const uint8_t* zeros, VecInt (&zero)[2]) {
  const VecInt bytes = load_bytes(zeros);
  zero[0] = Bits == 8 ? bytes : bytes & 15;
  zero[1] = Bits == 8 ? load_bytes(zeros + 16) : bytes >> 4;
}

template <int Bits, int R>
__attribute__((always_inline)) inline void add_run(const uint8_t* codes, const uint8_t* zeros, int chunk, int64_t steps,
                                                   const uint32_t* a, const uint16_t* scales, Dtype dtype, float* y,
                                                   int64_t ldy) {
  VecInt zero[2], sum[R][2];
  load_zeros<Bits>(zeros + chunk * kLanes, zero);
#pragma GCC unroll 16
  for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[m][v] = zero[v] * splat_int(static_cast<int32_t>(a[m]));
  const uint32_t* q = a + 2 * R;
  codes += chunk * kLanes * 4;
  for (int64_t s = 0; s < steps; ++s, q += R) {
    VecInt w[2];
    load_codes<Bits>(codes + s * kStepBytes<Bits>, w);
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m) {
      const VecInt factor = splat_int(static_cast<int32_t>(q[m]));
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) sum[m][v] = dot_bytes<Bits>(sum[m][v], w[v], factor);
    }
  }
  Vec scaled[R][2];
#pragma GCC unroll 16
  for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) scaled[m][v] = to_floats(sum[m][v]) * splat(from_bits(a[R + m]));
  add_scaled(scaled, scales, dtype, chunk, y, ldy);
}

template <int Bits, int R>
void dot_int8_rows(const WeightBlock* block, const uint32_t* a, float* y, int64_t ldy) {
  const uint8_t* codes = block->codes;
  for (int64_t g = 0; g < block->groups; ++g) {
    int64_t left = g + 1 < block->groups ? block->group_steps : block->last_steps;
    prefetch(block->scales + (g + kAheadGroups) * 32);
    const uint8_t* zeros = block->zeros + g * kZeroBytes<Bits>;
    prefetch(zeros + kAheadGroups * kZeroBytes<Bits>);
    for (int64_t steps; left > 0; left -= steps) {
      steps = left < kRunSteps ? left : kRunSteps;
      for (int chunk = 0; chunk < kChunks; ++chunk)
        add_run<Bits, R>(codes, zeros, chunk, steps, a, block->scales + g * 32, block->scale_dtype, y, ldy);
      codes += steps * kStepBytes<Bits>;
      a += (2 + steps) * R;
    }
  }
}

void dot_int8(const WeightBlock* block, const uint32_t* a, int rows, float* y, int64_t ldy) {
  for_bits(block->bits, [&](auto b) {
    for_rows<kDotRows>(rows, [&](auto r) { dot_int8_rows<b.count, r.count>(block, a, y, ldy); });
  });
}

// Adding 1.5 * 2^23 leaves an integer, rounded half to even, in the low bits of a float.
constexpr float kRounder = 12582912.0f;

inline VecInt round_to_ints(Vec v) { return (VecInt)(v + splat(kRounder)) - (VecInt)splat(kRounder); }

// kLanes integers from -127 to 127 as bytes, within each step in the order 0, 2, 1, 3.
inline void store_bytes(VecInt q, uint32_t* steps) {
#if defined(AWQ_LEVEL_AVX512)
  const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8((__m512i)q), order);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(steps), bytes);
#else
  for (int i = 0; i < kLanes; i += 4)
    steps[i / 4] = static_cast<uint32_t>((q[i] & 255) | (q[i + 2] & 255) << 8 | (q[i + 1] & 255) << 16) |
                   static_cast<uint32_t>(q[i + 3]) << 24;
#endif
}

Int8Run quantize_int8(const float* x, int64_t n, uint32_t* steps, float* rest) {
  // Bit patterns of positive floats are ordered as the floats are, with NaN above all.
  VecInt largest = {};
  float tail[kLanes] = {};
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = whole; i < n; ++i) tail[i - whole] = x[i];
  const auto vector = [&](int64_t i) { return load(i < whole ? x + i : tail); };
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecInt magnitude = (VecInt)vector(i) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = largest[i] > bits ? largest[i] : bits;
  const float scale = from_bits(static_cast<uint32_t>(bits)) / 127.0f;
  const Int8Run run{scale < 0x1p-126f ? 0x1p-126f : scale, 0};
  if (bits >= 0x7f800000) {
    __builtin_memset(steps, 0, static_cast<size_t>((n + 3) / 4 * 4));
    if (rest != nullptr) __builtin_memset(rest, 0, static_cast<size_t>(n) * 4);
    return run;
  }
  const Vec inverse = splat(1.0f / run.scale);
  VecInt sum = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec value = vector(i);
    const VecInt q = round_to_ints(value * inverse);
    sum += q;
    if (rest != nullptr) {
      float left[kLanes];
      store(left, fma(to_floats(q), splat(-run.scale), value));
      __builtin_memcpy(rest + i, left, static_cast<size_t>(n - i < kLanes ? n - i : kLanes) * 4);
    }
    uint32_t words[kLanes / 4];
    store_bytes(q, words);
    const int64_t count = (n - i + 3) / 4;
    __builtin_memcpy(steps + i / 4, words, static_cast<size_t>(count < kLanes / 4 ? count : kLanes / 4) * 4);
  }
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return {run.scale, total};
}
