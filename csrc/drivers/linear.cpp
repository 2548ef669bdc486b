#include "drivers/linear.h"

#include <algorithm>
#include <cstring>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/activations.h"
#include "drivers/choice.h"

namespace awq {
namespace {

constexpr int64_t kTaskBytes = 1 << 15;  // of codes that a task reads, at least
constexpr int64_t kStreamTasks = 2;      // at most, per thread: every task begins by waiting for memory
// The part of a weight that rows take turns on, codes in bytes or a panel in steps: with the activations of a block it
// fits the first-level cache, kPartTiles of them fit the second. A panel of fp32 is larger than codes of 4 bits by
// eight, one of bf16 for tiles by four.
constexpr int64_t kDecodeBytes = 1 << 14, kPanelSteps = 128, kPartTiles = 4;
static_assert(kDecodeBytes / step_bytes(8) % kRunSteps == 0);  // a part of a group holds whole runs

// Kernels and operands of one call.
struct Call {
  const KernelTable& table;
  const TiledWeight& weight;
  const Activations& a;
  const Choice choice;
  const TileProducts* tiles;  // null unless elements are in tiles
  int64_t rows;               // of activations
  Dtype dtype;
  const float* bias;
  void* y;
  int64_t steps, groups, group_steps, last_steps;

  Call(const KernelTable& table, const TiledWeight& w, const Activations& a, const Choice& choice, int64_t rows,
       Dtype dtype, const float* bias, void* y)
      : table(table), weight(w), a(a), choice(choice), rows(rows), dtype(dtype), bias(bias), y(y) {
    tiles = choice.element == Element::bf16_tile   ? table.tiles_bf16
            : choice.element == Element::int8_tile ? table.tiles_int8
                                                   : nullptr;
    steps = step_count(w.in_features, w.group_length);
    groups = ceil_div(w.in_features, w.group_length);
    group_steps = ceil_div(w.group_length, kStepChannels);
    last_steps = steps - (groups - 1) * group_steps;
  }
  int64_t element_rows() const { return rows * choice.terms; }
};

// The thread's tile registers for the duration of a task.
class TileTask {
 public:
  explicit TileTask(const Call& c) : tiles_(c.tiles) {
    if (tiles_ != nullptr) tiles_->begin(c.group_steps);
  }
  ~TileTask() {
    if (tiles_ != nullptr) tiles_->end();
  }
  TileTask(const TileTask&) = delete;
  TileTask& operator=(const TileTask&) = delete;

 private:
  const TileProducts* tiles_;
};

// Steps [first, first + count) of a tile: whole groups, or a part of one.
WeightBlock block_at(const Call& c, int64_t tile, int64_t first, int64_t count) {
  const int64_t group = first / c.group_steps, place = tile * c.groups + group;
  WeightBlock block;
  block.codes = c.weight.codes + (tile * c.steps + first) * step_bytes(c.weight.bits);
  block.scales = c.weight.scales + place * kTileOutputs;
  block.zeros = c.weight.zeros + place * tile_zero_bytes(c.weight.bits);
  block.scale_dtype = c.weight.scale_dtype;
  block.groups = ceil_div(count, c.group_steps);
  block.group_steps = c.group_steps;
  block.last_steps = count - (block.groups - 1) * c.group_steps;
  block.bits = c.weight.bits;
  return block;
}

// Adds up the terms of all rows of some tiles and the bias, rounds the sums and writes them to y.
void finish(const Call& c, float* sums, int64_t lds, int64_t tile, int64_t tiles) {
  const int64_t n = tile * kTileOutputs, count = std::min(tiles * kTileOutputs, c.weight.out_features - n);
  const int64_t bytes = dtype_bytes(c.dtype);
  for (int64_t m = 0; m < c.rows; ++m, sums += c.choice.terms * lds) {
    for (int64_t t = c.choice.terms - 1; t > 0; --t)  // the smallest first
      for (int64_t i = 0; i < count; ++i) sums[(t - 1) * lds + i] += sums[t * lds + i];
    if (c.bias != nullptr)
      for (int64_t i = 0; i < count; ++i) sums[i] += c.bias[n + i];
    char* to = static_cast<char*>(c.y) + (m * c.weight.out_features + n) * bytes;
    c.table.from_float(sums, c.dtype, count, to);
  }
}

void dot(const Call& c, const WeightBlock& block, const void* a, int rows, float* y, int64_t ldy) {
  switch (c.choice.element) {
    case Element::f32:
      return c.table.dot_f32(&block, static_cast<const float*>(a), rows, y, ldy);
    case Element::bf16_pair:
      return c.table.dot_bf16(&block, static_cast<const uint16_t*>(a), rows, y, ldy);
    case Element::int8_step:
      return c.table.dot_int8(&block, static_cast<const uint32_t*>(a), rows, y, ldy);
    case Element::bf16_tile:
    case Element::int8_tile:
      return c.tiles->dot(&block, static_cast<const uint32_t*>(a), rows, y, ldy);
  }
}

void stream(const Call& c, int threads) {
  const int64_t tiles = tile_count(c.weight.out_features);
  const int64_t bundle = std::clamp<int64_t>(kTaskBytes / (c.steps * step_bytes(c.weight.bits)),
                                             ceil_div(tiles, kStreamTasks * threads), ceil_div(tiles, threads));
  parallel_for<Threads::team_or_helpers>(ceil_div(tiles, bundle), threads, [&](int64_t task, int) {
    const TileTask tile_task(c);
    for (int64_t t = task * bundle; t < std::min(tiles, (task + 1) * bundle); ++t) {
      alignas(64) float sums[std::max(kMaxDotRows, kMostTileRows) * kTileOutputs];
      std::fill(sums, sums + c.element_rows() * kTileOutputs, 0.0f);
      dot(c, block_at(c, t, 0, c.steps), c.a.at(0, 0), c.a.rows(0), sums, kTileOutputs);
      finish(c, sums, kTileOutputs, t, 1);
    }
  });
}

// Some tiles of the weight, multiplied with all rows.
struct Part {
  int64_t tile, tiles;
  int64_t tile_values;  // words of a panel
  uint32_t* panel;
  float* sums;
  int64_t lds;
};

void decode_panel(const Call& c, const WeightBlock& block, uint32_t* panel) {
  if (c.tiles != nullptr)
    c.tiles->values(&block, panel);
  else
    c.table.panel_values(&block, reinterpret_cast<float*>(panel));
}

void multiply_panel(const Call& c, const WeightBlock& block, const uint32_t* panel, const void* a, int rows, float* y,
                    int64_t ldy) {
  if (c.tiles != nullptr)
    c.tiles->panel(&block, panel, static_cast<const uint32_t*>(a), rows, y, ldy);
  else
    c.table.panel_f32(&block, reinterpret_cast<const float*>(panel), static_cast<const float*>(a), rows, y, ldy);
}

// Words of a decoded part of a tile: a run on tile registers is padded to at most twice its length.
int64_t panel_words(const Call& c, int64_t steps) {
  return (c.tiles != nullptr ? 2 * c.tiles->step_words : kStepChannels) * steps * kTileOutputs;
}

// Adds steps [first, first + count) of a part.
void add_steps(const Call& c, const Part& part, int64_t first, int64_t count) {
  const bool panel = c.choice.way == Way::panel;
  if (panel)
    for (int64_t t = 0; t < part.tiles; ++t)
      decode_panel(c, block_at(c, part.tile + t, first, count), part.panel + t * part.tile_values);
  for (int64_t b = 0; b < c.a.blocks(); ++b)
    for (int64_t t = 0; t < part.tiles; ++t) {
      const WeightBlock block = block_at(c, part.tile + t, first, count);
      float* y = part.sums + c.a.rows_before(b) * part.lds + t * kTileOutputs;
      if (panel)
        multiply_panel(c, block, part.panel + t * part.tile_values, c.a.at(b, first), c.a.rows(b), y, part.lds);
      else
        dot(c, block, c.a.at(b, first), c.a.rows(b), y, part.lds);
    }
}

void take_turns(const Call& c, int threads) {
  const int64_t tiles = tile_count(c.weight.out_features);
  // As many tasks as keep all threads busy to the end, each with at most kPartTiles tiles.
  const int64_t tasks = std::min(tiles, round_up(ceil_div(tiles, kPartTiles), threads));
  const int64_t bundle = ceil_div(tiles, tasks), lds = bundle * kTileOutputs;
  const bool panel = c.choice.way == Way::panel;
  const int64_t most = c.tiles != nullptr ? kTileRunSteps  // so that sums do not depend on the way
                       : panel            ? kPanelSteps
                                          : kDecodeBytes / step_bytes(c.weight.bits);
  const int64_t whole = most / c.group_steps * c.group_steps;  // groups that fit, or parts of one
  const int64_t tile_values = panel ? panel_words(c, most) : 0, rows = c.element_rows();
  const int64_t size = round_up(bundle * tile_values + rows * lds, 16);  // whole cache lines
  Scratch<Part, uint32_t> scratch(threads * size);
  parallel_for<Threads::team_or_helpers>(ceil_div(tiles, bundle), threads, [&](int64_t task, int thread) {
    const TileTask tile_task(c);
    uint32_t* values = scratch.get() + thread * size;
    float* sums = reinterpret_cast<float*>(values + bundle * tile_values);
    std::memset(sums, 0, static_cast<size_t>(rows * lds) * 4);
    const int64_t tile = task * bundle, count = std::min(bundle, tiles - tile);
    const Part part{tile, count, tile_values, values, sums, lds};
    for (int64_t first = 0, length; first < c.steps; first += length) {
      // A part of a group ends where the group does.
      length = whole > 0 ? whole : std::min(most, c.group_steps - first % c.group_steps);
      length = std::min(length, c.steps - first);
      add_steps(c, part, first, length);
    }
    finish(c, sums, lds, tile, count);
  });
}

// With a small weight and many rows, threads divide the rows, so that each packs what it reads and writes what it
// summed. Otherwise cores would read what another core has just written, which is slow: a tenth to a third of such a
// product. The number of chunks changes no result, because from five rows on all block sizes sum in the same order.
int64_t row_chunks(const TiledWeight& weight, int64_t rows, int threads) {
  constexpr int64_t kWeightBytes = 1 << 19, kChunkRows = 72, kLeastRows = 16;
  const int64_t bytes =
      tile_count(weight.out_features) * step_count(weight.in_features, weight.group_length) * step_bytes(weight.bits);
  if (threads == 1 || bytes > kWeightBytes || rows < kLeastRows * 2 * threads) return 1;
  return std::min(round_up(ceil_div(rows, kChunkRows), threads), rows / kLeastRows);
}

void multiply_rows(const KernelTable& table, const TiledWeight& weight, const void* x, Dtype dtype, int64_t rows,
                   const float* input_scale, const float* bias, Compute compute, void* y, int threads) {
  const Choice choice = choose(table, dtype, compute, rows);
  const InputView view{x, dtype, rows, weight.in_features, input_scale};
  const Activations a(table, view, weight.group_length, choice.element, choice.terms, choice.block_rows, threads);
  const Call call(table, weight, a, choice, rows, dtype, bias, y);
  choice.way == Way::stream ? stream(call, threads) : take_turns(call, threads);
}

}  // namespace

void quant_linear(const KernelTable& table, const TiledWeight& weight, const void* x, Dtype dtype, int64_t rows,
                  const float* input_scale, const float* bias, Compute compute, void* y, int threads) {
  const int64_t chunks = row_chunks(weight, rows, threads), bytes = dtype_bytes(dtype);
  if (chunks == 1) return multiply_rows(table, weight, x, dtype, rows, input_scale, bias, compute, y, threads);
  parallel_for<Threads::team_or_helpers>(chunks, threads, [&](int64_t chunk, int) {
    const int64_t first = chunk * rows / chunks, end = (chunk + 1) * rows / chunks;
    const char* from = static_cast<const char*>(x) + first * weight.in_features * bytes;
    char* to = static_cast<char*>(y) + first * weight.out_features * bytes;
    multiply_rows(table, weight, from, dtype, end - first, input_scale, bias, compute, to, 1);
  });
}

void quant_weight(const KernelTable& table, const TiledWeight& w, float* out, int threads) {
  const int64_t steps = step_count(w.in_features, w.group_length), groups = ceil_div(w.in_features, w.group_length);
  const int64_t size = w.group_length + kStepChannels;
  Buffer<float> scratch(threads * size * kTileOutputs);
  parallel_for(tile_count(w.out_features), threads, [&](int64_t t, int thread) {
    float* values = scratch.get() + thread * size * kTileOutputs;
    const uint8_t* codes = w.codes + t * steps * step_bytes(w.bits);
    const int64_t n = t * kTileOutputs, count = std::min(kTileOutputs, w.out_features - n);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * w.group_length, length = std::min(w.group_length, w.in_features - begin);
      const int64_t place = t * groups + g, group_steps = ceil_div(length, kStepChannels);
      const WeightBlock block{codes,
                              w.scales + place * kTileOutputs,
                              w.zeros + place * tile_zero_bytes(w.bits),
                              w.scale_dtype,
                              1,
                              group_steps,
                              group_steps,
                              w.bits};
      table.panel_values(&block, values);
      float scale[kTileOutputs];
      table.to_float(block.scales, w.scale_dtype, kTileOutputs, scale);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < length; ++i)
          out[(n + j) * w.in_features + begin + i] = values[i * kTileOutputs + j] * scale[j];
      codes += group_steps * step_bytes(w.bits);
    }
  });
}

}  // namespace awq
