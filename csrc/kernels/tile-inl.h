// Products with weights of 4 or 8 bits in the compute layout (base/layout.h): outputs along the lanes, activations
// broadcast.
//
// One loop serves all kernels: within a group, sums of (code - zero) * a stay in registers; at its end they are
// multiplied by the scale and added to y. A source supplies the weights: it decodes codes on the fly (few rows), or
// loads them from a panel that was decoded before (and many rows share). It yields vectors of one chunk of the tile:
// 2 * kLanes outputs, j and 16 + j for consecutive j. The number of bits is a template argument: for_bits chooses once
// a call, and no loop asks for it.

constexpr int kChunks = 16 / kLanes;  // of a tile
#if defined(AWQ_LEVEL_AVX512)
constexpr int kDotRows = 12;  // 24 sums, 4 constants, and the weights being decoded
#elif defined(AWQ_LEVEL_NEON)
constexpr int kDotRows = 8;
#else
constexpr int kDotRows = 4;  // of 16 registers
#endif

// How far ahead memory is prefetched: the processor's own prefetching stops at every page. Past the end of the array
// it is harmless, because a prefetch does not fault.
constexpr int64_t kAheadBytes = 10240, kAheadGroups = 4;

#if defined(AWQ_LEVEL_AMX)
// Into the second-level cache: in the first, lines that wait for memory would be in the way of tiles.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
#else
inline void prefetch(const void* p) { __builtin_prefetch(p); }
#endif

typedef VecInt VecIntUnaligned __attribute__((aligned(1), may_alias));

inline VecInt load_ints(const void* p) { return *static_cast<const VecIntUnaligned*>(p); }
inline void store_ints(void* p, VecInt v) { *static_cast<VecIntUnaligned*>(p) = v; }

// kLanes scales of 2 bytes.
inline Vec load_scales(const uint16_t* p, Dtype dtype) {
#if defined(AWQ_LEVEL_AVX512)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (dtype == Dtype::f16) return _mm512_cvtph_ps(bits);
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#else
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i)
    values[i] = dtype == Dtype::f16 ? half_to_float(p[i]) : from_bits(static_cast<uint32_t>(p[i]) << 16);
  return load(values);
#endif
}

// y += sum * scale for the vectors of a chunk.
template <int R>
__attribute__((always_inline)) inline void add_scaled(const Vec (&sum)[R][2], const uint16_t* scales, Dtype dtype,
                                                      int chunk, float* y, int64_t ldy) {
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const int n = v * 16 + chunk * kLanes;
    const Vec scale = load_scales(scales + n, dtype);
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m) store(y + m * ldy + n, fma(sum[m][v], scale, load(y + m * ldy + n)));
  }
}

// The lowest nibble of each lane as a float; higher bits are ignored.
inline Vec nibble_values(VecInt bits) {
#if defined(AWQ_LEVEL_AVX512)
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_permutexvar_ps((__m512i)bits, table);  // reads only four bits of each index
#else
  return __builtin_convertvector(bits & 15, Vec);
#endif
}

// Bytes of a step, and of a group's zeros.
template <int Bits>
constexpr int64_t kStepBytes = 16 * Bits;
template <int Bits>
constexpr int64_t kZeroBytes = 4 * Bits;

// Decodes fp32 from the codes: zeros as floats, codes one by one.
template <int Bits>
struct Codes;

template <>
struct Codes<4> {
  const uint8_t* codes;
  Vec zero[2];

  Codes(const uint8_t* step, const uint8_t* zeros, int chunk) : codes(step + chunk * kLanes * 4) {
    const VecInt both = load_bytes(zeros + chunk * kLanes);
    zero[0] = __builtin_convertvector(both & 15, Vec);
    zero[1] = __builtin_convertvector(both >> 4, Vec);
  }
  // Channel k of step s, outputs 16 v + j.
  __attribute__((always_inline)) Vec weight(int64_t s, int k, int v) const {
    const VecInt bits = load_ints(codes + s * 64);
    if (k == 0 && v == 0) prefetch(codes + s * 64 + kAheadBytes);
    return nibble_values(bits >> (4 * (v + 2 * (k >> 1) + 4 * (k & 1)))) - zero[v];
  }
};

// A byte below the exponent of 2^23 makes a float of 2^23 + code, and the zero subtracts 2^23 again: both exact.
template <>
struct Codes<8> {
  const uint8_t* codes;
  Vec zero[2];

  Codes(const uint8_t* step, const uint8_t* zeros, int chunk) : codes(step + chunk * kLanes * 4) {
    for (int v = 0; v < 2; ++v) zero[v] = float_above(load_bytes(zeros + v * 16 + chunk * kLanes));
  }
  __attribute__((always_inline)) Vec weight(int64_t s, int k, int v) const {
    const VecInt bits = load_ints(codes + s * 128 + v * 64);
    if (k == 0) prefetch(codes + s * 128 + v * 64 + kAheadBytes);
    return float_above(bits >> (8 * ((k >> 1) + 2 * (k & 1)))) - zero[v];
  }
  static Vec float_above(VecInt bits) { return (Vec)((bits & 255) | 0x4b000000); }
};

struct Panel {
  const float* values;

  Panel(const float* step, int chunk) : values(step + chunk * kLanes) {}
  __attribute__((always_inline)) Vec weight(int64_t s, int k, int v) const {
    return load(values + (s * 4 + k) * 32 + v * 16);
  }
};

template <int R, class Source>
__attribute__((always_inline)) inline void dot_group(const Source& source, int64_t steps, const float* a,
                                                     Vec (&sum)[R][2]) {
  for (int64_t s = 0; s < steps; ++s, a += 4 * R)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const Vec w[2] = {source.weight(s, k, 0), source.weight(s, k, 1)};
#pragma GCC unroll 16
      for (int m = 0; m < R; ++m)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) sum[m][v] = fma(w[v], splat(a[k * R + m]), sum[m][v]);
    }
}

template <int Bits, int R>
void dot_f32_rows(const WeightBlock* block, const float* a, float* y, int64_t ldy) {
  const uint8_t* codes = block->codes;
  for (int64_t g = 0; g < block->groups; ++g) {
    const int64_t steps = g + 1 < block->groups ? block->group_steps : block->last_steps;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Vec sum[R][2] = {};
      dot_group(Codes<Bits>(codes, block->zeros + g * kZeroBytes<Bits>, chunk), steps, a, sum);
      add_scaled(sum, block->scales + g * 32, block->scale_dtype, chunk, y, ldy);
    }
    codes += steps * kStepBytes<Bits>;
    a += steps * 4 * R;
  }
}

template <int R>
void panel_f32_rows(const WeightBlock* block, const float* values, const float* a, float* y, int64_t ldy) {
  for (int64_t g = 0; g < block->groups; ++g) {
    const int64_t steps = g + 1 < block->groups ? block->group_steps : block->last_steps;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Vec sum[R][2] = {};
      dot_group(Panel(values, chunk), steps, a, sum);
      add_scaled(sum, block->scales + g * 32, block->scale_dtype, chunk, y, ldy);
    }
    values += steps * 4 * 32;
    a += steps * 4 * R;
  }
}

template <int Bits>
void decode_block(const WeightBlock* block, float* values) {
  const uint8_t* codes = block->codes;
  for (int64_t g = 0; g < block->groups; ++g) {
    const int64_t steps = g + 1 < block->groups ? block->group_steps : block->last_steps;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const Codes<Bits> source(codes, block->zeros + g * kZeroBytes<Bits>, chunk);
      for (int64_t s = 0; s < steps; ++s)
        for (int k = 0; k < 4; ++k)
          for (int v = 0; v < 2; ++v)
            store(values + (s * 4 + k) * 32 + v * 16 + chunk * kLanes, source.weight(s, k, v));
    }
    codes += steps * kStepBytes<Bits>;
    values += steps * 4 * 32;
  }
}

// Runs body<r> for the r in 1..R that equals rows: with a compile-time number of rows the sums stay in registers.
template <int R>
struct Rows {
  static constexpr int count = R;
};

template <int R, class Body>
__attribute__((always_inline)) inline void for_rows(int rows, const Body& body) {
  if constexpr (R > 1)
    if (rows != R) return for_rows<R - 1>(rows, body);
  body(Rows<R>());
}

// Runs body<b> for the width b of the codes.
template <int B>
struct Width {
  static constexpr int count = B;
};

template <class Body>
__attribute__((always_inline)) inline void for_bits(int bits, const Body& body) {
  if (bits == 8) return body(Width<8>());
  body(Width<4>());
}

void dot_f32(const WeightBlock* block, const float* a, int rows, float* y, int64_t ldy) {
  for_bits(block->bits, [&](auto b) {
    for_rows<kDotRows>(rows, [&](auto r) { dot_f32_rows<b.count, r.count>(block, a, y, ldy); });
  });
}

void panel_values(const WeightBlock* block, float* values) {
  for_bits(block->bits, [&](auto b) { decode_block<b.count>(block, values); });
}

void panel_f32(const WeightBlock* block, const float* values, const float* a, int rows, float* y, int64_t ldy) {
  for_rows<kRows>(rows, [&](auto r) { panel_f32_rows<r.count>(block, values, a, y, ldy); });
}

// Element by element, for all rows: every row is read, and the result written, in order.
void interleave(const void* x, int64_t ldx, int64_t n, int rows, void* out) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(out);
  for_rows<kRows>(rows, [&](auto r) {
    for (int64_t i = 0; i < n; ++i)
      for (int m = 0; m < r.count; ++m) __builtin_memcpy(to + (i * r.count + m) * 4, from + (m * ldx + i) * 4, 4);
  });
}
