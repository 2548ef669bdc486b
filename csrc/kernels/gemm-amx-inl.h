// The products of gemm-inl.h on tile registers (amx-tiles-inl.h): bf16 factors, 32 x 32 outputs in four tiles.
//
// A step is 32 of k, as deep as a tile. Left panels hold, for each step and term, two tiles of 16 rows; right panels 16
// rows of 32 pairs, of which each tile takes half. See Bf16Products in kernels.h for terms.

constexpr int kStepK = 2 * kTileSide, kSquare = 2 * kTileSide;
constexpr int kStepNumbers = kStepK * kSquare;  // of a panel, for each term

inline void load_left(const uint16_t* a) {
  tile_load<4>(a, kTileBytes);
  tile_load<5>(a + kStepNumbers / 2, kTileBytes);
}
inline void load_right(const uint16_t* b) {
  tile_load<6>(b, 2 * kTileBytes);
  tile_load<7>(b + kSquare, 2 * kTileBytes);
}
inline void add_products() {
  tile_dot_bf16<0, 4, 6>();
  tile_dot_bf16<1, 4, 7>();
  tile_dot_bf16<2, 5, 6>();
  tile_dot_bf16<3, 5, 7>();
}

// Adds the products of one step, in an order in which each follows from the one before by loading one factor. The
// largest, 1 1, comes last or nearly so: nothing large is there yet when the small ones are added.
template <int Terms>
inline void add_step(const uint16_t* a, const uint16_t* b) {
  constexpr int kTerm = kStepNumbers;  // to the next term
  if constexpr (Terms == 3) {
    load_left(a + 2 * kTerm);
    load_right(b);
    add_products();  // 3 1
    load_left(a + kTerm);
    add_products();  // 2 1
    load_right(b + kTerm);
    add_products();  // 2 2
    load_left(a);
    add_products();  // 1 2
    load_right(b);
    add_products();  // 1 1
    load_right(b + 2 * kTerm);
    add_products();  // 1 3
  } else if constexpr (Terms == 2) {
    load_left(a + kTerm);
    load_right(b + kTerm);
    add_products();  // 2 2
    load_left(a);
    add_products();  // 1 2
    load_right(b);
    add_products();  // 1 1
    load_left(a + kTerm);
    add_products();  // 2 1
  } else {
    load_left(a);
    load_right(b);
    add_products();  // 1 1
  }
}

template <int Terms>
inline void add_steps(const uint16_t* a, const uint16_t* b, int64_t k) {
  for (int64_t i = 0; i < k; i += kStepK, a += Terms * kStepNumbers, b += Terms * kStepNumbers) add_step<Terms>(a, b);
}

// The product of two panels, as [32][32].
inline void multiply_panels(const uint16_t* a, const uint16_t* b, int64_t k, int terms, float* product) {
  constexpr int64_t kStride = 2 * kTileBytes;
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  if (terms == 1)
    add_steps<1>(a, b, k);
  else if (terms == 2)
    add_steps<2>(a, b, k);
  else
    add_steps<3>(a, b, k);
  tile_store<0>(product, kStride);
  tile_store<1>(product + kTileSide, kStride);
  tile_store<2>(product + kTileSide * kSquare, kStride);
  tile_store<3>(product + kTileSide * kSquare + kTileSide, kStride);
}

void gemm_on_tiles(const uint16_t* a, const uint16_t* b, int64_t k, int terms, float* c, int64_t ldc) {
  alignas(64) float product[kSquare * kSquare];
  multiply_panels(a, b, k, terms, product);
  for (int m = 0; m < kSquare; ++m)
    for (int n = 0; n < kSquare; n += kLanes) {
      float* p = c + m * ldc + n;
      store(p, load(p) + load(product + m * kSquare + n));
    }
}

void quadratic_on_tiles(const uint16_t* a, const uint16_t* b, int64_t k, int terms, const float* e, int64_t lde,
                        double* out) {
  alignas(64) float product[kSquare * kSquare];
  multiply_panels(a, b, k, terms, product);
  for (int m = 0; m < kSquare; ++m) {
    Vec sum = {};
    for (int n = 0; n < kSquare; n += kLanes) sum = fma(load(product + m * kSquare + n), load(e + m * lde + n), sum);
    out[m] += static_cast<double>(sum_lanes(sum));
  }
}

// A step's pairs, 0 where there are no rows.
inline void pack_step(const uint16_t* x, int64_t ldx, int64_t rows, int64_t cols, uint16_t* out) {
  const int64_t count = rows < kStepK ? rows : kStepK;
  pack_column_pairs(x, ldx, count, cols, kSquare, out);
  for (int64_t i = (count + 1) / 2 * 2 * kSquare; i < kStepNumbers; ++i) out[i] = 0;
}

void pack_right_tiles(const uint16_t* x, int64_t ldx, int64_t k, int64_t cols, int terms, uint16_t* out) {
  for (int64_t r = 0; r < k; r += kStepK, out += terms * kStepNumbers) pack_step(x + r * ldx, ldx, k - r, cols, out);
}

void pack_left_tiles(const uint16_t* x, int64_t ldx, int64_t k, int64_t cols, int terms, uint16_t* out) {
  for (int64_t r = 0; r < k; r += kStepK, out += terms * kStepNumbers) {
    uint16_t pairs[kStepNumbers];  // [16][32] pairs: the transpose of what is wanted
    pack_step(x + r * ldx, ldx, k - r, cols, pairs);
    for (int m = 0; m < kSquare; ++m)
      for (int i = 0; i < kTileSide; ++i) __builtin_memcpy(out + m * kStepK + 2 * i, pairs + 2 * (i * kSquare + m), 4);
  }
}

// Infinity and NaN, but also finite numbers that rounding would make infinite, become their upper half.
void split_bf16(float* x, int64_t n, uint16_t* term) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = to_bits(x[i]), cut = bits & 0xffff0000u;
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) & 0xffff0000u;
    const bool finite = (bits & 0x7f800000u) != 0x7f800000u, quiet = (bits & 0x7fffffffu) > 0x7f800000u;
    const bool fits = (rounded & 0x7f800000u) != 0x7f800000u;
    const uint32_t upper = finite && fits ? rounded : quiet ? cut | 0x400000u : cut;
    term[i] = static_cast<uint16_t>(upper >> 16);
    x[i] = finite ? x[i] - from_bits(upper) : 0.0f;
  }
}

void pack_row_tiles(const float* x, int64_t ldx, int64_t k, int terms, uint16_t* out) {
  for (int64_t i = 0; i < k; i += kStepK, out += terms * kStepNumbers)
    for (int m = 0; m < kSquare; ++m) {
      const float* row = x + m * ldx + i;
      uint16_t* to = out + m * kStepK;
      if (terms == 1) {
        for (int j = 0; j < kStepK; ++j) to[j] = static_cast<uint16_t>(to_bits(row[j]) >> 16);
        continue;
      }
      float rest[kStepK];
      __builtin_memcpy(rest, row, sizeof(rest));
      for (int t = 0; t < terms; ++t) split_bf16(rest, kStepK, to + t * kStepNumbers);
    }
}

void matrix_begin() { tile_configure(kTileSide); }

constexpr Bf16Products tile_matrix_products() {
  return {kSquare,
          kSquare,
          kStepK,
          matrix_begin,
          tile_release,
          gemm_on_tiles,
          quadratic_on_tiles,
          pack_left_tiles,
          pack_right_tiles,
          pack_row_tiles,
          split_bf16,
          round_panel<kSquare, kSquare>};
}
