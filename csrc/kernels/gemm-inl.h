// Matrix products on packed panels: one register tile that is either added to C (X^T X, contracted over rows) or
// multiplied into a bilinear form (E G E^T, contracted over channels). See kernels.h for the panels' layout.
//
// The tile takes nearly all registers: kRows * kCols accumulators, kCols vectors of b, one broadcast of a. Each step of
// k has kRows * kCols FMAs for kRows + kCols loads, enough for both FMA pipes at two loads per cycle.

#if defined(AWQ_LEVEL_AVX512)
constexpr int kRows = 14, kCols = 2;  // 32 registers
#elif defined(AWQ_LEVEL_NEON)
constexpr int kRows = 10, kCols = 2;  // 32 registers
#else
constexpr int kRows = 6, kCols = 2;  // 16 registers
#endif
constexpr int kWidth = kCols * kLanes;

struct Tile {
  Vec sum[kRows][kCols];
};

__attribute__((always_inline)) inline void contract(Tile& tile, const float* a, const float* b, int64_t k) {
  for (int64_t i = 0; i < k; ++i, a += kRows, b += kWidth) {
    Vec row[kCols];
    for (int v = 0; v < kCols; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec factor = splat(a[m]);
#pragma GCC unroll 2
      for (int v = 0; v < kCols; ++v) tile.sum[m][v] = fma(factor, row[v], tile.sum[m][v]);
    }
  }
}

__attribute__((always_inline)) inline void add_to(const Tile& tile, float* c, int64_t ldc) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < kCols; ++v) {
      float* p = c + m * ldc + v * kLanes;
      store(p, load(p) + tile.sum[m][v]);
    }
}

__attribute__((always_inline)) inline void add_bilinear(const Tile& tile, const float* e, int64_t lde, double* out) {
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
    Vec sum = tile.sum[m][0] * load(e + m * lde);
#pragma GCC unroll 2
    for (int v = 1; v < kCols; ++v) sum = fma(tile.sum[m][v], load(e + m * lde + v * kLanes), sum);
    out[m] += static_cast<double>(sum_lanes(sum));
  }
}

void gemm_tile(const float* a, const float* b, int64_t k, float* c, int64_t ldc) {
  Tile tile = {};
  contract(tile, a, b, k);
  add_to(tile, c, ldc);
}

void quadratic_tile(const float* a, const float* b, int64_t k, const float* e, int64_t lde, double* out) {
  Tile tile = {};
  contract(tile, a, b, k);
  add_bilinear(tile, e, lde, out);
}

#if defined(AWQ_LEVEL_BF16)
__attribute__((always_inline)) inline void contract_bf16(Tile& tile, const uint16_t* a, const uint16_t* b, int64_t k) {
  for (int64_t i = 0; i < k; i += 2, a += 2 * kRows, b += 2 * kWidth) {
    __m512bh row[kCols];
    for (int v = 0; v < kCols; ++v) row[v] = (__m512bh)_mm512_loadu_si512(b + v * 2 * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      int32_t pair;
      __builtin_memcpy(&pair, a + 2 * m, 4);
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
      for (int v = 0; v < kCols; ++v) tile.sum[m][v] = _mm512_dpbf16_ps(tile.sum[m][v], row[v], factor);
    }
  }
}

void gemm_tile_bf16(const uint16_t* a, const uint16_t* b, int64_t k, int, float* c, int64_t ldc) {
  Tile tile = {};
  contract_bf16(tile, a, b, k);
  add_to(tile, c, ldc);
}

void quadratic_tile_bf16(const uint16_t* a, const uint16_t* b, int64_t k, int, const float* e, int64_t lde,
                         double* out) {
  Tile tile = {};
  contract_bf16(tile, a, b, k);
  add_bilinear(tile, e, lde, out);
}
#endif
