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
// The part of a weight that rows take turns on, codes in bytes or a panel in steps (of fp32, eight times as large as
// codes of 4 bits): with a block's activations it fits the first-level cache, kPartTiles of them fit the second.
constexpr int64_t kDecodeBytes = 1 << 14, kPanelSteps = 128, kPartTiles = 4;
// On tile registers a panel has one tile, of kTileRunSteps. Sums of kTilePartTiles and of kBandRows rows of
// activations, 512 KiB, stay in a second-level cache of 2 MiB together with a panel's part of these rows, 256 KiB.
constexpr int64_t kTilePartTiles = 8, kBandRows = 512;
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

// Sums of some tiles for all rows of elements: a row of a tile, the next one, and that of the next tile.
struct Sums {
  float* data;
  int64_t row, tile;  // from one to the next
  float* at(int64_t r, int64_t t) const { return data + r * row + t * tile; }
};

// Adds up the terms of a row of some outputs and the bias, rounds the sums and writes them to y.
void finish_row(const Call& c, float* sums, int64_t to_term, int64_t m, int64_t n, int64_t count) {
  for (int64_t t = c.choice.terms - 1; t > 0; --t)  // the smallest first
    for (int64_t i = 0; i < count; ++i) sums[(t - 1) * to_term + i] += sums[t * to_term + i];
  if (c.bias != nullptr)
    for (int64_t i = 0; i < count; ++i) sums[i] += c.bias[n + i];
  char* y = static_cast<char*>(c.y) + (m * c.weight.out_features + n) * dtype_bytes(c.dtype);
  c.table.from_float(sums, c.dtype, count, y);
}

// All rows of some tiles, so many at a time that what is read and what is written stay in the first-level cache.
void finish(const Call& c, const Sums& sums, int64_t tile, int64_t tiles) {
  constexpr int64_t kRows = 32;
  const int64_t n = tile * kTileOutputs, count = std::min(tiles * kTileOutputs, c.weight.out_features - n);
  const int64_t width = sums.tile == kTileOutputs ? tiles * kTileOutputs : kTileOutputs;  // that is in one piece
  for (int64_t begin = 0, end; begin < c.rows; begin = end) {
    end = std::min(begin + kRows, c.rows);
    for (int64_t first = 0; first < count; first += width)
      for (int64_t m = begin; m < end; ++m)
        finish_row(c, sums.at(m * c.choice.terms, first / kTileOutputs), sums.row, m, n + first,
                   std::min(width, count - first));
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
      const TileRows tile_rows{static_cast<const uint32_t*>(a), rows, y};
      return c.tiles->dot(&block, &tile_rows);
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
      finish(c, {sums, kTileOutputs, kTileOutputs}, t, 1);
    }
  });
}

// Some tiles of the weight, multiplied with all rows.
struct Part {
  int64_t tile, tiles;
  int64_t tile_values;  // words of a panel
  uint32_t* panel;
  Sums sums;
};

// Words of a decoded part of a tile: a run on tile registers is padded to at most twice its length.
int64_t panel_words(const Call& c, int64_t steps) {
  return (c.tiles != nullptr ? 2 * c.tiles->step_words : kStepChannels) * steps * kTileOutputs;
}

// Adds steps [first, first + count) of a part, block of rows by block of rows.
void add_steps(const Call& c, const Part& part, int64_t first, int64_t count) {
  const bool panel = c.choice.way == Way::panel;
  const auto values = [&](int64_t t) { return reinterpret_cast<float*>(part.panel + t * part.tile_values); };
  if (panel)
    for (int64_t t = 0; t < part.tiles; ++t) {
      const WeightBlock block = block_at(c, part.tile + t, first, count);
      c.table.panel_values(&block, values(t));
    }
  for (int64_t b = 0; b < c.a.blocks(); ++b) {
    const void* a = c.a.at(b, first);
    for (int64_t t = 0; t < part.tiles; ++t) {
      const WeightBlock block = block_at(c, part.tile + t, first, count);
      float* y = part.sums.at(c.a.rows_before(b), t);
      if (panel)
        c.table.panel_f32(&block, values(t), static_cast<const float*>(a), c.a.rows(b), y, part.sums.row);
      else
        dot(c, block, a, c.a.rows(b), y, part.sums.row);
    }
  }
}

// The same on tile registers: all rows pass by a decoded tile, which stays in the first-level cache.
void add_tile_steps(const Call& c, const Part& part, int64_t first, int64_t count) {
  TileRows rows[kBandRows];
  for (int64_t b = 0; b < c.a.blocks(); ++b)
    rows[b] = {static_cast<const uint32_t*>(c.a.at(b, first)), c.a.rows(b), nullptr};
  for (int64_t t = 0; t < part.tiles; ++t) {
    const WeightBlock block = block_at(c, part.tile + t, first, count);
    for (int64_t b = 0; b < c.a.blocks(); ++b) rows[b].y = part.sums.at(c.a.rows_before(b), t);
    c.tiles->values(&block, part.panel);
    c.tiles->panel(&block, part.panel, rows, c.a.blocks());
  }
}

void take_turns(const Call& c, int threads) {
  const int64_t tiles = tile_count(c.weight.out_features);
  // As many tasks as keep all threads busy to the end, each with at most so many tiles.
  const bool in_tiles = c.tiles != nullptr, panel = c.choice.way == Way::panel;
  const int64_t tasks = std::min(tiles, round_up(ceil_div(tiles, in_tiles ? kTilePartTiles : kPartTiles), threads));
  const int64_t bundle = ceil_div(tiles, tasks);
  const int64_t most = in_tiles ? kTileRunSteps  // so that sums do not depend on the way
                       : panel  ? kPanelSteps
                                : kDecodeBytes / step_bytes(c.weight.bits);
  const int64_t whole = most / c.group_steps * c.group_steps;  // groups that fit, or parts of one
  const int64_t tile_values = panel ? panel_words(c, most) : 0, panel_values = (in_tiles ? 1 : bundle) * tile_values;
  const int64_t rows = c.element_rows(), sums_size = rows * bundle * kTileOutputs;
  const int64_t to_row = (in_tiles ? 1 : bundle) * kTileOutputs, to_tile = (in_tiles ? rows : 1) * kTileOutputs;
  const int64_t size = round_up(panel_values + sums_size, 16);  // whole cache lines
  Scratch<Part, uint32_t> scratch(threads * size);
  parallel_for<Threads::team_or_helpers>(ceil_div(tiles, bundle), threads, [&](int64_t task, int thread) {
    const TileTask tile_task(c);
    uint32_t* values = scratch.get() + thread * size;
    const Sums sums{reinterpret_cast<float*>(values + panel_values), to_row, to_tile};
    std::memset(sums.data, 0, static_cast<size_t>(sums_size) * 4);
    const int64_t tile = task * bundle, count = std::min(bundle, tiles - tile);
    const Part part{tile, count, tile_values, values, sums};
    for (int64_t first = 0, length; first < c.steps; first += length) {
      // A part of a group ends where the group does.
      length = whole > 0 ? whole : std::min(most, c.group_steps - first % c.group_steps);
      length = std::min(length, c.steps - first);
      in_tiles ? add_tile_steps(c, part, first, length) : add_steps(c, part, first, length);
    }
    finish(c, sums, tile, count);
  });
}

// With a small weight and many rows, threads divide the rows, so that each packs what it reads and writes what it
// summed. Otherwise cores would read what another core has just written, which is slow: a tenth to a third of such a
// product. The number of chunks changes no result, because from five rows on all block sizes sum in the same order.
int64_t row_chunks(const TiledWeight& weight, int64_t rows, bool tiles, int threads) {
  constexpr int64_t kWeightBytes = 1 << 19, kLeastRows = 16;
  const int64_t chunk_rows = tiles ? 256 : 72;  // on tile registers, decoding is a larger part of the work
  const int64_t bytes =
      tile_count(weight.out_features) * step_count(weight.in_features, weight.group_length) * step_bytes(weight.bits);
  if (threads == 1 || bytes > kWeightBytes || rows < kLeastRows * 2 * threads) return 1;
  return std::min(round_up(ceil_div(rows, chunk_rows), threads), rows / kLeastRows);
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
  const int64_t to_input = weight.in_features * dtype_bytes(dtype),
                to_output = weight.out_features * dtype_bytes(dtype);
  const auto multiply = [&](int64_t part, int64_t parts, int with_threads) {
    const int64_t first = part * rows / parts, count = (part + 1) * rows / parts - first;
    multiply_rows(table, weight, static_cast<const char*>(x) + first * to_input, dtype, count, input_scale, bias,
                  compute, static_cast<char*>(y) + first * to_output, with_threads);
  };
  const Choice choice = choose(table, dtype, compute, rows);
  const bool tiles = on_tiles(choice.element);
  const int64_t chunks = row_chunks(weight, rows, tiles, threads);
  const auto chunk = [&](int64_t i, int) { multiply(i, chunks, 1); };
  if (chunks > 1) return parallel_for<Threads::team_or_helpers>(chunks, threads, chunk);
  const int64_t bands = tiles ? ceil_div(rows * choice.terms, kBandRows) : 1;
  for (int64_t band = 0; band < bands; ++band) multiply(band, bands, threads);
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
