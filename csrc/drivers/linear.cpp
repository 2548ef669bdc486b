#include "drivers/linear.h"

#include <algorithm>
#include <cstring>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/activations.h"

namespace awq {
namespace {

// How a product is computed depends on its number of rows:
//
//   stream   the weight is read once, from one end to the other, and decoded in registers for all rows at once
//   decode   blocks of rows take turns on a part of the weight that stays in the cache; each decodes it in registers
//   panel    such a part is decoded once, into a panel that all blocks of rows read
//
// From 8 rows in a block on, decoding hides behind the products (0.97 of their peak rate in bf16, 0.9 in fp32), and a
// panel, which is larger than the codes, only costs. With 16 registers a block has 4 rows, and a panel wins above three
// such blocks.
struct Way {
  int64_t stream_rows;  // at most, else decode or panel
  int64_t block_rows;
  bool panel;
};

Way choose_way(const KernelTable& table, Element element, int64_t rows) {
  // kBf16Rows: the activations and weights of a block fit the first-level cache; twelve rows were slower when measured.
  constexpr int64_t kBf16Rows = 9, kManyRows = 8, kPanelRows = 12;
  if (element == Element::bf16_pair) return {table.dot_rows, kBf16Rows, false};
  if (element == Element::int8_step) return {table.dot_rows, table.dot_rows, false};
  if (table.dot_rows >= kManyRows || rows <= kPanelRows) return {table.dot_rows, table.dot_rows, false};
  return {table.dot_rows, table.tile_rows, true};
}

constexpr int64_t kTaskBytes = 1 << 15;  // of codes that a task reads, at least
constexpr int64_t kStreamTasks = 2;      // at most, per thread: every task begins by waiting for memory
// Steps of the part of a weight that rows take turns on: with the activations of a block it fits the first-level cache,
// kPartTiles of them fit the second. A panel is eight times as large as its codes.
constexpr int64_t kDecodeSteps = 256, kPanelSteps = 128, kPartTiles = 4;
static_assert(kDecodeSteps % kRunSteps == 0);  // a part of a group holds whole runs

// Kernels and operands of one call.
struct Call {
  const KernelTable& table;
  const TiledWeight& weight;
  const Activations& a;
  const Way way;
  Element element;
  int64_t rows;
  Dtype dtype;
  const float* bias;
  void* y;
  int64_t steps, groups, group_steps, last_steps;

  Call(const KernelTable& table, const TiledWeight& w, const Activations& a, Way way, Element element, int64_t rows,
       Dtype dtype, const float* bias, void* y)
      : table(table), weight(w), a(a), way(way), element(element), rows(rows), dtype(dtype), bias(bias), y(y) {
    steps = step_count(w.in_features, w.group_length);
    groups = ceil_div(w.in_features, w.group_length);
    group_steps = ceil_div(w.group_length, kStepChannels);
    last_steps = steps - (groups - 1) * group_steps;
  }
};

// Steps [first, first + count) of a tile: whole groups, or a part of one.
Int4Block block_at(const Call& c, int64_t tile, int64_t first, int64_t count) {
  const int64_t group = first / c.group_steps, place = tile * c.groups + group;
  Int4Block block;
  block.codes = c.weight.codes + (tile * c.steps + first) * kStepBytes;
  block.scales = c.weight.scales + place * kTileOutputs;
  block.zeros = c.weight.zeros + place * kTileZeroBytes;
  block.scale_dtype = c.weight.scale_dtype;
  block.groups = ceil_div(count, c.group_steps);
  block.group_steps = c.group_steps;
  block.last_steps = count - (block.groups - 1) * c.group_steps;
  return block;
}

// Adds the bias to the sums of `rows` rows of some tiles, rounds them and writes them to y.
void finish(const Call& c, float* sums, int64_t lds, int64_t first_row, int64_t rows, int64_t tile, int64_t tiles) {
  const int64_t n = tile * kTileOutputs, count = std::min(tiles * kTileOutputs, c.weight.out_features - n);
  const int64_t bytes = dtype_bytes(c.dtype);
  for (int64_t m = 0; m < rows; ++m, sums += lds) {
    if (c.bias != nullptr)
      for (int64_t i = 0; i < count; ++i) sums[i] += c.bias[n + i];
    char* to = static_cast<char*>(c.y) + ((first_row + m) * c.weight.out_features + n) * bytes;
    c.table.from_float(sums, c.dtype, count, to);
  }
}

void dot(const Call& c, const Int4Block& block, const void* a, int rows, float* y, int64_t ldy) {
  switch (c.element) {
    case Element::f32:
      return c.table.int4_dot(&block, static_cast<const float*>(a), rows, y, ldy);
    case Element::bf16_pair:
      return c.table.int4_dot_bf16(&block, static_cast<const uint16_t*>(a), rows, y, ldy);
    case Element::int8_step:
      return c.table.int4_dot_int8(&block, static_cast<const uint32_t*>(a), rows, y, ldy);
  }
}

void stream(const Call& c, int threads) {
  const int64_t tiles = tile_count(c.weight.out_features);
  const int64_t bundle = std::clamp<int64_t>(kTaskBytes / (c.steps * kStepBytes),
                                             ceil_div(tiles, kStreamTasks * threads), ceil_div(tiles, threads));
  parallel_for<Threads::team_or_helpers>(ceil_div(tiles, bundle), threads, [&](int64_t task, int) {
    for (int64_t t = task * bundle; t < std::min(tiles, (task + 1) * bundle); ++t) {
      alignas(64) float sums[kMaxDotRows * kTileOutputs];
      std::fill(sums, sums + c.rows * kTileOutputs, 0.0f);
      dot(c, block_at(c, t, 0, c.steps), c.a.at(0, 0), c.a.rows(0), sums, kTileOutputs);
      finish(c, sums, kTileOutputs, 0, c.rows, t, 1);
    }
  });
}

// Some tiles of the weight, multiplied with all rows.
struct Part {
  int64_t tile, tiles;
  int64_t tile_values;  // of a panel
  float* panel;
  float* sums;
  int64_t lds;
};

// Adds steps [first, first + count) of a part.
void add_steps(const Call& c, const Part& part, int64_t first, int64_t count) {
  if (c.way.panel)
    for (int64_t t = 0; t < part.tiles; ++t) {
      const Int4Block block = block_at(c, part.tile + t, first, count);
      c.table.int4_values(&block, part.panel + t * part.tile_values);
    }
  for (int64_t b = 0; b < c.a.blocks(); ++b)
    for (int64_t t = 0; t < part.tiles; ++t) {
      const Int4Block block = block_at(c, part.tile + t, first, count);
      float* y = part.sums + c.a.rows_before(b) * part.lds + t * kTileOutputs;
      if (c.way.panel)
        c.table.int4_panel(&block, part.panel + t * part.tile_values, static_cast<const float*>(c.a.at(b, first)),
                           c.a.rows(b), y, part.lds);
      else
        dot(c, block, c.a.at(b, first), c.a.rows(b), y, part.lds);
    }
}

void take_turns(const Call& c, int threads) {
  const int64_t tiles = tile_count(c.weight.out_features);
  // As many tasks as keep all threads busy to the end, each with at most kPartTiles tiles.
  const int64_t tasks = std::min(tiles, round_up(ceil_div(tiles, kPartTiles), threads));
  const int64_t bundle = ceil_div(tiles, tasks), lds = bundle * kTileOutputs;
  const int64_t most = c.way.panel ? kPanelSteps : kDecodeSteps;
  const int64_t whole = most / c.group_steps * c.group_steps;  // groups that fit, or parts of one
  const int64_t tile_values = c.way.panel ? most * kStepChannels * kTileOutputs : 0;
  const int64_t size = bundle * tile_values + c.rows * lds;
  Scratch<Part, float> scratch(threads * size);
  parallel_for<Threads::team_or_helpers>(ceil_div(tiles, bundle), threads, [&](int64_t task, int thread) {
    float *panel = scratch.get() + thread * size, *sums = panel + bundle * tile_values;
    std::memset(sums, 0, static_cast<size_t>(c.rows * lds) * 4);
    const int64_t tile = task * bundle, count = std::min(bundle, tiles - tile);
    const Part part{tile, count, tile_values, panel, sums, lds};
    for (int64_t first = 0, length; first < c.steps; first += length) {
      // A part of a group ends where the group does.
      length = whole > 0 ? whole : std::min(most, c.group_steps - first % c.group_steps);
      length = std::min(length, c.steps - first);
      add_steps(c, part, first, length);
    }
    finish(c, sums, lds, 0, c.rows, tile, count);
  });
}

// With a small weight and many rows, threads divide the rows, so that each packs what it reads and writes what it
// summed. Otherwise cores would read what another core has just written, which is slow: a tenth to a third of such a
// product. The number of chunks changes no result, because from five rows on all block sizes sum in the same order.
int64_t row_chunks(const TiledWeight& weight, int64_t rows, int threads) {
  constexpr int64_t kWeightBytes = 1 << 19, kChunkRows = 72, kLeastRows = 16;
  const int64_t bytes =
      tile_count(weight.out_features) * step_count(weight.in_features, weight.group_length) * kStepBytes;
  if (threads == 1 || bytes > kWeightBytes || rows < kLeastRows * 2 * threads) return 1;
  return std::min(round_up(ceil_div(rows, kChunkRows), threads), rows / kLeastRows);
}

void multiply_rows(const KernelTable& table, const TiledWeight& weight, const void* x, Dtype dtype, int64_t rows,
                   const float* input_scale, const float* bias, Compute compute, void* y, int threads) {
  const bool bf16 = dtype == Dtype::bf16 && table.int4_dot_bf16 != nullptr;
  const Element element = compute == Compute::int8 ? Element::int8_step : bf16 ? Element::bf16_pair : Element::f32;
  const Way way = choose_way(table, element, rows);
  const bool once = rows <= way.stream_rows;
  const InputView view{x, dtype, rows, weight.in_features, input_scale};
  const Activations a(table, view, weight.group_length, element, once ? way.stream_rows : way.block_rows, threads);
  const Call call(table, weight, a, way, element, rows, dtype, bias, y);
  once ? stream(call, threads) : take_turns(call, threads);
}

}  // namespace

void int4_linear(const KernelTable& table, const TiledWeight& weight, const void* x, Dtype dtype, int64_t rows,
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

void int4_weight(const KernelTable& table, const TiledWeight& w, float* out, int threads) {
  const int64_t steps = step_count(w.in_features, w.group_length), groups = ceil_div(w.in_features, w.group_length);
  const int64_t size = w.group_length + kStepChannels;
  Buffer<float> scratch(threads * size * kTileOutputs);
  parallel_for(tile_count(w.out_features), threads, [&](int64_t t, int thread) {
    float* values = scratch.get() + thread * size * kTileOutputs;
    const uint8_t* codes = w.codes + t * steps * kStepBytes;
    const int64_t n = t * kTileOutputs, count = std::min(kTileOutputs, w.out_features - n);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = g * w.group_length, length = std::min(w.group_length, w.in_features - begin);
      const int64_t place = t * groups + g, group_steps = ceil_div(length, kStepChannels);
      const Int4Block block{
          codes,      w.scales + place * kTileOutputs, w.zeros + place * kTileZeroBytes, w.scale_dtype, 1, group_steps,
          group_steps};
      table.int4_values(&block, values);
      float scale[kTileOutputs];
      table.to_float(block.scales, w.scale_dtype, kTileOutputs, scale);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t i = 0; i < length; ++i)
          out[(n + j) * w.in_features + begin + i] = values[i * kTileOutputs + j] * scale[j];
      codes += group_steps * kStepBytes;
    }
  });
}

}  // namespace awq
