// What the products of tile-amx-inl.h do beside multiplying: decode codes, scale sums and add them to y.
//
// Tiles multiply beside everything else, if that comes in small pieces between their products: a processor looks only
// some hundred instructions ahead. So after each tile come some steps of the codes that are multiplied next, and some
// rows of the sums of the run before (a run is a group, or a part of a long one) on their way into y. There are two
// places for decoded codes, and two for sums. Adding two runs at a time would halve what y is read and written, but
// four places for sums leave too little of the first-level cache: slower when measured.

// A run whose sums are stored but not all in y yet.
struct StoredRun {
  const uint32_t* minus_sums;    // of activations in eight bits, one for each row
  const uint32_t* input_scales;  // likewise
  const uint16_t* scales;
  const uint8_t* zeros;
  float* y;
  int rows;
};

// The sums of runs on their way into y.
template <class Form, int Bits>
class LateSums {
 public:
  explicit LateSums(Dtype dtype) : dtype_(dtype) {}
  uint32_t* place() { return sums_[place_]; }

  // The sums at place() are those of `next`, which had so many tiles.
  void stored(const StoredRun& next, int64_t tiles) {
    finish();
    run_ = next;
    done_ = 0;
    part_ = (next.rows + static_cast<int>(tiles) - 1) / static_cast<int>(tiles);
    place_ ^= 1;
  }
  // Adds some rows to y: all are there after as many tiles as the run had.
  void some() {
    if (done_ < run_.rows) add(run_.rows - done_ < part_ ? run_.rows - done_ : part_);
  }
  void finish() {
    if (done_ < run_.rows) add(run_.rows - done_);
  }

 private:
  // Reads what is in memory once: as far as a compiler knows, stores to y may change it.
  void add(int rows) {
    constexpr int kVecs = 32 / kLanes;
    const uint32_t *sums = sums_[place_ ^ 1] + done_ * kPairWords, *minus_sums = run_.minus_sums + done_,
                   *input_scales = run_.input_scales + done_;
    float* y = run_.y + done_ * kPairWords;
    Vec scale[kVecs], zero[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      scale[v] = load_scales(run_.scales + v * kLanes, dtype_);
      VecInt both[2];
      load_zeros<Bits>(run_.zeros + v * kLanes % 16, both);
      zero[v] = to_floats(both[v * kLanes / 16]);
    }
    done_ += rows;
    for (int m = 0; m < rows; ++m, sums += kPairWords, y += kPairWords)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        const VecInt bits = load_ints(sums + v * kLanes);
        Vec sum = (Vec)bits;
        if constexpr (Form::kScaled) {  // all below 2^24 (kRunSteps), so exact in fp32, which is quicker than integers
          const Vec minus_sum = to_floats(splat_int(static_cast<int32_t>(minus_sums[m])));
          sum = fma(zero[v], minus_sum, to_floats(bits)) * splat(from_bits(input_scales[m]));
        }
        store(y + v * kLanes, fma(sum, scale[v], load(y + v * kLanes)));
      }
  }

  Dtype dtype_;
  int place_ = 0;
  StoredRun run_ = {};
  int done_ = 0, part_ = 0;  // rows that are in y; rows at a time
  alignas(64) uint32_t sums_[2][kMostTileRows * kPairWords];
};

// Codes decoded on the way, a piece ahead, into places in the first-level cache. Pieces are parts of a group.
template <class Form, int Bits>
class DecodedOnTheWay {
 public:
  DecodedOnTheWay(const WeightBlock* block, int depth) : block_(block), depth_(depth), codes_(block->codes) {
    left_ = steps_of(0);
    begin_piece();
    decode(steps_);
  }

  // Multiplies the next steps, which are a run, and calls between() after each tile. Returns the number of tiles.
  template <int Halves, class Between>
  int64_t add(const uint32_t* left, int64_t steps, Between between) {
    int64_t t = 0;
    for (; steps > 0; steps -= kPiece) {
      const uint32_t* right = rows_[place_];
      const int64_t end = t + tiles_of<Form>(steps < kPiece ? steps : kPiece, depth_);
      place_ ^= 1;
      begin_piece();
      for (; t < end; ++t, right += depth_ * kPairWords, left += Halves * kTileWords) {
        add_tile<Form, Halves>(left, right);
        decode(kSlice);
        between();
      }
      decode(steps_);
    }
    return t;
  }

 private:
  static constexpr int64_t kPiece = 32;  // steps: whole tiles, or the only one
  static constexpr int64_t kSlice = kTileSide / Form::kStepRows;
  static_assert(Form::kRun % kPiece == 0);

  int64_t steps_of(int64_t group) const {
    return group + 1 < block_->groups ? block_->group_steps : block_->last_steps;
  }
  void begin_piece() {
    if (left_ == 0 && ++group_ < block_->groups) left_ = steps_of(group_);
    steps_ = left_ < kPiece ? left_ : kPiece;
    left_ -= steps_;
    to_ = rows_[place_];
    pad_tiles<Form>(steps_, depth_, to_);
  }
  void decode(int64_t most) {
    const int64_t count = most < steps_ ? most : steps_;
    if (count == 0) return;
    Form::template decode<Bits>(codes_, block_->zeros + group_ * kZeroBytes<Bits>, count, to_);
    codes_ += count * kStepBytes<Bits>;
    to_ += count * Form::kStepRows * kPairWords;
    steps_ -= count;
  }

  const WeightBlock* block_;
  int depth_;
  const uint8_t* codes_;
  int64_t group_ = 0, left_;  // the group that is decoded, and its steps that are in no piece yet
  int64_t steps_;             // of the piece that is decoded, yet to come
  uint32_t* to_;
  int place_ = 0;
  alignas(64) uint32_t rows_[2][kPiece * Form::kStepRows * kPairWords + kTileSide * kPairWords];
};

// What tile_values has decoded.
template <class Form>
struct DecodedBefore {
  const uint32_t* rows;
  int depth;

  template <int Halves, class Between>
  int64_t add(const uint32_t* left, int64_t steps, Between between) {
    const int64_t count = tiles_of<Form>(steps, depth);
    for (int64_t t = 0; t < count; ++t, rows += depth * kPairWords, left += Halves * kTileWords) {
      add_tile<Form, Halves>(left, rows);
      between();
    }
    return count;
  }
};
