// The products of tile-inl.h on tile registers (amx-tiles-inl.h): up to 32 rows of activations times 32 outputs, in
// four sums of 16 x 16.
//
// The compute layout (base/layout.h) fits as it is. A step decodes to rows of the right tiles: two rows of bf16 pairs,
// channels 0, 1 and 2, 3; or one row of bytes, channels 0, 2, 1, 3, the order in which quantize_int8 writes them too.
// Sixteen such rows, or all rows of a group that has fewer, are the depth of a tile; what is missing at a group's end
// is 0 on both sides. The sums of a run (a group, or a part of a long one) are stored, scaled and added to y while the
// next run's products are under way: there are two places to store them.

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

// Decodes steps and fills the last tile with zeros; returns the number of tiles.
template <class Form, int Bits>
inline int64_t decode_tiles(const uint8_t* codes, const uint8_t* zeros, int64_t steps, int depth, uint32_t* rows) {
  Form::template decode<Bits>(codes, zeros, steps, rows);
  const int64_t used = steps * Form::kStepRows, count = (used + depth - 1) / depth;
  for (int64_t i = used * kPairWords; i < count * depth * kPairWords; ++i) rows[i] = 0;
  return count;
}

// Adds the products of `count` tiles. left: [count][Halves] tiles; right: [count * depth][32] words.
template <class Form, int Halves>
inline void add_tiles(const uint32_t* left, const uint32_t* right, int64_t count, int depth) {
  constexpr int64_t kStride = kPairWords * 4;
  for (int64_t t = 0; t < count; ++t, left += Halves * kTileWords, right += depth * kPairWords) {
    tile_load<4>(left, kTileBytes);
    tile_load<6>(right, kStride);
    Form::template dot<0, 4, 6>();
    tile_load<7>(right + 16, kStride);
    Form::template dot<1, 4, 7>();
    if constexpr (Halves == 2) {
      tile_load<5>(left + kTileWords, kTileBytes);
      Form::template dot<2, 5, 6>();
      Form::template dot<3, 5, 7>();
    }
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

// A run whose sums are stored but not yet in y.
struct StoredRun {
  const uint32_t* sums;    // [rows][32]
  const uint32_t* inputs;  // of activations in eight bits: -sum of each row of all halves, then scales
  const uint16_t* scales;
  const uint8_t* zeros;
};

template <class Form, int Bits, int Halves>
inline void add_run_to(const StoredRun& run, Dtype dtype, int rows, float* y, int64_t ldy) {
  for (int n = 0; n < 32; n += kLanes) {
    const Vec scale = load_scales(run.scales + n, dtype);
    VecInt zeros[2];
    load_zeros<Bits>(run.zeros + n % 16, zeros);
    const VecInt zero = zeros[n / 16];
    for (int m = 0; m < rows; ++m) {
      const VecInt bits = load_ints(run.sums + m * kPairWords + n);
      Vec sum = (Vec)bits;
      if constexpr (Form::kScaled) {
        const VecInt whole = bits + zero * splat_int(static_cast<int32_t>(run.inputs[m]));
        sum = to_floats(whole) * splat(from_bits(run.inputs[Halves * kTileSide + m]));
      }
      store(y + m * ldy + n, fma(sum, scale, load(y + m * ldy + n)));
    }
  }
}

// Codes decoded a chunk at a time, into a place in the first-level cache.
template <class Form, int Bits>
struct DecodedOnTheWay {
  static constexpr int64_t kChunk = 32;  // steps: whole tiles, or the only one
  const uint8_t* codes;
  alignas(64) uint32_t rows[(kChunk * Form::kStepRows + kTileSide) * kPairWords];

  template <int Halves>
  int64_t add(const uint32_t* left, const uint8_t* zeros, int64_t steps, int depth) {
    int64_t tiles = 0;
    for (int64_t s = 0; s < steps; s += kChunk, codes += kChunk * kStepBytes<Bits>) {
      const int64_t count =
          decode_tiles<Form, Bits>(codes, zeros, steps - s < kChunk ? steps - s : kChunk, depth, rows);
      add_tiles<Form, Halves>(left + tiles * Halves * kTileWords, rows, count, depth);
      tiles += count;
    }
    codes += (steps - (steps + kChunk - 1) / kChunk * kChunk) * kStepBytes<Bits>;
    return tiles;
  }
};

// What tile_values has decoded.
template <class Form>
struct DecodedBefore {
  const uint32_t* rows;

  template <int Halves>
  int64_t add(const uint32_t* left, const uint8_t*, int64_t steps, int depth) {
    const int64_t count = (steps * Form::kStepRows + depth - 1) / depth;
    add_tiles<Form, Halves>(left, rows, count, depth);
    rows += count * depth * kPairWords;
    return count;
  }
};

template <class Form, int Bits, int Halves, class Source>
inline void tile_product(const WeightBlock* block, Source& source, const uint32_t* a, int rows, float* y, int64_t ldy) {
  alignas(64) uint32_t sums[2][Halves * kTileSide * kPairWords];
  const int depth = depth_of<Form>(block);
  StoredRun before = {};
  int place = 0;
  for (int64_t g = 0; g < block->groups; ++g) {
    int64_t left = g + 1 < block->groups ? block->group_steps : block->last_steps;
    prefetch(block->scales + (g + kAheadGroups) * 32);
    prefetch(block->zeros + (g + kAheadGroups) * kZeroBytes<Bits>);
    for (int64_t steps; left > 0; left -= steps, place ^= 1) {
      steps = left < Form::kRun ? left : Form::kRun;
      const StoredRun run = {sums[place], a, block->scales + g * 32, block->zeros + g * kZeroBytes<Bits>};
      if constexpr (Form::kScaled) a += 2 * Halves * kTileSide;
      clear_sums<Halves>();
      a += source.template add<Halves>(a, run.zeros, steps, depth) * Halves * kTileWords;
      store_sums<Halves>(sums[place]);
      if (before.sums != nullptr) add_run_to<Form, Bits, Halves>(before, block->scale_dtype, rows, y, ldy);
      before = run;
    }
  }
  add_run_to<Form, Bits, Halves>(before, block->scale_dtype, rows, y, ldy);
}

template <class Form, int Bits, class Source>
inline void for_halves(const WeightBlock* block, Source& source, const uint32_t* a, int rows, float* y, int64_t ldy) {
  if (rows > kTileSide)
    tile_product<Form, Bits, 2>(block, source, a, rows, y, ldy);
  else
    tile_product<Form, Bits, 1>(block, source, a, rows, y, ldy);
}

template <class Form>
void tile_begin(int64_t group_steps) {
  WeightBlock block = {};
  block.group_steps = group_steps;
  tile_configure(depth_of<Form>(&block));
}
void tile_end() { tile_release(); }

template <class Form>
void tile_dot(const WeightBlock* block, const uint32_t* a, int rows, float* y, int64_t ldy) {
  for_bits(block->bits, [&](auto b) {
    DecodedOnTheWay<Form, b.count> source;
    source.codes = block->codes;
    for_halves<Form, b.count>(block, source, a, rows, y, ldy);
  });
}

template <class Form>
void tile_panel(const WeightBlock* block, const uint32_t* values, const uint32_t* a, int rows, float* y, int64_t ldy) {
  for_bits(block->bits, [&](auto b) {
    DecodedBefore<Form> source{values};
    for_halves<Form, b.count>(block, source, a, rows, y, ldy);
  });
}

template <class Form, int Bits>
inline void decode_block_tiles(const WeightBlock* block, uint32_t* values) {
  const int depth = depth_of<Form>(block);
  const uint8_t* codes = block->codes;
  for (int64_t g = 0; g < block->groups; ++g) {
    const uint8_t* zeros = block->zeros + g * kZeroBytes<Bits>;
    int64_t left = g + 1 < block->groups ? block->group_steps : block->last_steps;
    for (int64_t steps; left > 0; left -= steps, codes += steps * kStepBytes<Bits>) {
      steps = left < Form::kRun ? left : Form::kRun;
      values += decode_tiles<Form, Bits>(codes, zeros, steps, depth, values) * depth * kPairWords;
    }
  }
}

template <class Form>
void tile_values(const WeightBlock* block, uint32_t* values) {
  for_bits(block->bits, [&](auto b) { decode_block_tiles<Form, b.count>(block, values); });
}

template <class Form>
constexpr TileProducts tile_products() {
  return {Form::kStepRows, Form::kRun, tile_begin<Form>, tile_end, tile_dot<Form>, tile_values<Form>, tile_panel<Form>};
}

bool keep_tiles(void (*meanwhile)(void*), void* argument) {
  alignas(64) uint32_t before[kTileWords], after[2 * kTileWords];
  for (uint32_t i = 0; i < kTileWords; ++i) before[i] = 0x9e3779b9u * (i + 1);
  tile_configure(kTileSide);
  tile_load<0>(before, kTileBytes);
  tile_load<6>(before, kTileBytes);
  meanwhile(argument);
  tile_store<0>(after, kTileBytes);
  tile_store<6>(after + kTileWords, kTileBytes);
  tile_release();
  return __builtin_memcmp(before, after, sizeof(before)) == 0 &&
         __builtin_memcmp(before, after + kTileWords, sizeof(before)) == 0;
}
