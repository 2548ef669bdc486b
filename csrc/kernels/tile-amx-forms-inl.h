// What the products of tile-amx-inl.h do for a tile: in bf16, or in bytes.

constexpr int kPairWords = 32;  // a row of both right tiles: 32 outputs

// Both forms. kStepRows: rows of the right tiles that a step decodes to; kRun: the most steps of a run.
struct TileBf16 {
  static constexpr int kStepRows = 2;
  static constexpr int64_t kRun = kTileRunSteps;
  static constexpr bool kScaled = false;
  template <int Bits>
  static void decode(const uint8_t* codes, const uint8_t* zeros, int64_t steps, uint32_t* rows);
  template <int Sum, int Left, int Right>
  static void dot() {
    tile_dot_bf16<Sum, Left, Right>();
  }
};

struct TileInt8 {
  static constexpr int kStepRows = 1;
  static constexpr int64_t kRun = kRunSteps;
  static constexpr bool kScaled = true;  // activations have a sum and a scale for each run
  template <int Bits>
  static void decode(const uint8_t* codes, const uint8_t* zeros, int64_t steps, uint32_t* rows);
  template <int Sum, int Left, int Right>
  static void dot() {
    tile_dot_int8<Sum, Left, Right>();
  }
};

template <int Bits>
void TileBf16::decode(const uint8_t* codes, const uint8_t* zeros, int64_t steps, uint32_t* rows) {
#if defined(AWQ_LEVEL_AVX512)
  const CodesBf16<Bits> source(codes, zeros);
  for (int64_t s = 0; s < steps; ++s, rows += 2 * kPairWords) {
    const StepBf16 step = source.step(s);
    for (int p = 0; p < 2; ++p)
      for (int v = 0; v < 2; ++v) _mm512_storeu_si512(rows + p * kPairWords + v * 16, step.w[p][v]);
  }
#else
  float values[4][32];
  for (int64_t s = 0; s < steps; ++s, rows += 2 * kPairWords) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const Codes<Bits> source(codes, zeros, chunk);
      for (int k = 0; k < 4; ++k)
        for (int v = 0; v < 2; ++v) store(values[k] + v * 16 + chunk * kLanes, source.weight(s, k, v));
    }
    for (int p = 0; p < 2; ++p)
      for (int n = 0; n < 32; ++n)
        rows[p * kPairWords + n] = to_bits(values[2 * p][n]) >> 16 | to_bits(values[2 * p + 1][n]);
  }
#endif
}

template <int Bits>
void TileInt8::decode(const uint8_t* codes, const uint8_t*, int64_t steps, uint32_t* rows) {
  for (int64_t s = 0; s < steps; ++s, codes += kStepBytes<Bits>, rows += kPairWords)
    for (int c = 0; c < 16; c += kLanes) {
      VecInt w[2];
      load_codes<Bits>(codes + 4 * c, w);
      store_ints(rows + c, w[0]);
      store_ints(rows + 16 + c, w[1]);
    }
}

// Words in a row of left tiles, rows of right ones: whole groups if they are short.
template <class Form>
inline int depth_of(const WeightBlock* block) {
  const int64_t rows = block->group_steps * Form::kStepRows;
  return rows < kTileSide ? static_cast<int>(rows) : kTileSide;
}

// Tiles that so many steps of a group fill.
template <class Form>
inline int64_t tiles_of(int64_t steps, int depth) {
  return (steps * Form::kStepRows + depth - 1) / depth;
}

// Zeros where the last tile has no steps.
template <class Form>
inline void pad_tiles(int64_t steps, int depth, uint32_t* rows) {
  const int64_t end = tiles_of<Form>(steps, depth) * depth * kPairWords;
  for (int64_t i = steps * Form::kStepRows * kPairWords; i < end; ++i) rows[i] = 0;
}

// Adds the products of a tile. left: [Halves] tiles; right: [depth][32] words.
template <class Form, int Halves>
inline void add_tile(const uint32_t* left, const uint32_t* right) {
  constexpr int64_t kStride = kPairWords * 4;
  tile_load_once<4>(left, kTileBytes);
  tile_load<6>(right, kStride);
  Form::template dot<0, 4, 6>();
  tile_load<7>(right + 16, kStride);
  Form::template dot<1, 4, 7>();
  if constexpr (Halves == 2) {
    tile_load_once<5>(left + kTileWords, kTileBytes);
    Form::template dot<2, 5, 6>();
    Form::template dot<3, 5, 7>();
  }
}

template <int Halves>
inline void clear_sums() {
  tile_zero<0>();
  tile_zero<1>();
  if constexpr (Halves == 2) {
    tile_zero<2>();
    tile_zero<3>();
  }
}

// As [rows][32].
template <int Halves>
inline void store_sums(uint32_t* sums) {
  constexpr int64_t kStride = kPairWords * 4;
  tile_store<0>(sums, kStride);
  tile_store<1>(sums + 16, kStride);
  if constexpr (Halves == 2) {
    tile_store<2>(sums + 16 * kPairWords, kStride);
    tile_store<3>(sums + 16 * kPairWords + 16, kStride);
  }
}
