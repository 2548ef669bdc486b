// The products of tile-inl.h on tile registers (amx-tiles-inl.h): up to 32 rows of activations times 32 outputs, in
// four sums of 16 x 16.
//
// The compute layout (base/layout.h) fits as it is. A step decodes to rows of the right tiles: two rows of bf16 pairs,
// channels 0, 1 and 2, 3; or one row of bytes, channels 0, 2, 1, 3, the order in which quantize_int8 writes them too.
// Sixteen such rows, or all rows of a group that has fewer, are the depth of a tile; what is missing at a group's end
// is 0 on both sides.

template <class Form, int Bits, int Halves, class Source>
inline void tile_product(const WeightBlock* block, Source& source, const TileRows* rows, LateSums<Form, Bits>& late) {
  constexpr int kRows = Halves * kTileSide;
  const uint32_t* a = rows->a;
  for (int64_t g = 0; g < block->groups; ++g) {
    int64_t left = g + 1 < block->groups ? block->group_steps : block->last_steps;
    const uint16_t* scales = block->scales + g * 32;
    const uint8_t* zeros = block->zeros + g * kZeroBytes<Bits>;
    prefetch(scales + kAheadGroups * 32);
    prefetch(zeros + kAheadGroups * kZeroBytes<Bits>);
    for (int64_t steps; left > 0; left -= steps) {
      steps = left < Form::kRun ? left : Form::kRun;
      const StoredRun run{a, a + kRows, scales, zeros, rows->y, rows->rows};
      if constexpr (Form::kScaled) a += 2 * kRows;
      clear_sums<Halves>();
      const int64_t tiles = source.template add<Halves>(a, steps, [&] { late.some(); });
      a += tiles * Halves * kTileWords;
      store_sums<Halves>(late.place());
      late.stored(run, tiles);
    }
  }
}

template <class Form, int Bits, class Source>
inline void for_halves(const WeightBlock* block, Source& source, const TileRows* rows, LateSums<Form, Bits>& late) {
  if (rows->rows > kTileSide)
    tile_product<Form, Bits, 2>(block, source, rows, late);
  else
    tile_product<Form, Bits, 1>(block, source, rows, late);
}

template <class Form>
void tile_begin(int64_t group_steps) {
  WeightBlock block = {};
  block.group_steps = group_steps;
  tile_configure(depth_of<Form>(&block));
}
void tile_end() { tile_release(); }

template <class Form>
void tile_dot(const WeightBlock* block, const TileRows* rows) {
  for_bits(block->bits, [&](auto b) {
    DecodedOnTheWay<Form, b.count> source(block, depth_of<Form>(block));
    LateSums<Form, b.count> late(block->scale_dtype);
    for_halves(block, source, rows, late);
    late.finish();
  });
}

template <class Form>
void tile_panel(const WeightBlock* block, const uint32_t* values, const TileRows* rows, int64_t count) {
  for_bits(block->bits, [&](auto b) {
    LateSums<Form, b.count> late(block->scale_dtype);
    for (int64_t i = 0; i < count; ++i) {
      DecodedBefore<Form> source{values, depth_of<Form>(block)};
      for_halves(block, source, rows + i, late);
    }
    late.finish();
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
      Form::template decode<Bits>(codes, zeros, steps, values);
      pad_tiles<Form>(steps, depth, values);
      values += tiles_of<Form>(steps, depth) * depth * kPairWords;
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
