#include "linear.h"

#include <algorithm>
#include <cstring>

#include "activations.h"
#include "buffer.h"
#include "layout.h"
#include "parallel.h"

namespace awq {
namespace {

// Where one way of computing takes over from another, as tests/benchmarks/bench_linear.py measured it: up to this many
// rows the codes are decoded in registers, anew for each block of rows; above, a panel of them is decoded for all.
constexpr int64_t kDotRowsF32 = 12, kDotRowsBf16 = 12;
constexpr int64_t kTaskBytes = 1 << 15;  // codes that a task of the first way reads at least
constexpr int64_t kPanelSteps = 128;     // of a panel of the second way: with kPanelTiles tiles it stays in L2
constexpr int64_t kPanelTiles = 4;

// Kernels and operands of one call. Elements are fp32, or pairs of bf16: 4 bytes.
struct Call {
  const KernelTable& table;
  const TiledWeight& weight;
  const Activations& a;
  bool bf16;
  int64_t rows;
  Dtype dtype;
  const float* bias;
  void* y;
  int64_t steps, groups, group_steps, last_steps;

  Call(const KernelTable& table, const TiledWeight& w, const Activations& a, bool bf16, int64_t rows, Dtype dtype,
       const float* bias, void* y)
      : table(table), weight(w), a(a), bf16(bf16), rows(rows), dtype(dtype), bias(bias), y(y) {
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

// Bias, rounding and the way out for `rows` rows of some tiles.
void finish(const Call& c, float* sums, int64_t lds, int64_t first_row, int64_t rows, int64_t tile, int64_t tiles) {
  const int64_t n = tile * kTileOutputs, count = std::min(tiles * kTileOutputs, c.weight.out_features - n);
  const int64_t bytes = c.dtype == Dtype::f32 ? 4 : 2;
  for (int64_t m = 0; m < rows; ++m, sums += lds) {
    if (c.bias != nullptr)
      for (int64_t i = 0; i < count; ++i) sums[i] += c.bias[n + i];
    char* to = static_cast<char*>(c.y) + ((first_row + m) * c.weight.out_features + n) * bytes;
    c.table.from_float(sums, c.dtype, count, to);
  }
}

void dot(const Call& c, const Int4Block& block, const void* a, int rows, float* y) {
  if (c.bf16)
    c.table.int4_dot_bf16(&block, static_cast<const uint16_t*>(a), rows, y, kTileOutputs);
  else
    c.table.int4_dot(&block, static_cast<const float*>(a), rows, y, kTileOutputs);
}

void linear_by_dots(const Call& c, int threads) {
  constexpr int kMaxRows = 16;
  const int64_t tiles = tile_count(c.weight.out_features);
  const int64_t bundle = std::clamp<int64_t>(kTaskBytes / (c.steps * kStepBytes), 1, ceil_div(tiles, threads));
  parallel_for(ceil_div(tiles, bundle), threads, [&](int64_t task, int) {
    for (int64_t t = task * bundle; t < std::min(tiles, (task + 1) * bundle); ++t)
      for (int64_t b = 0; b < c.a.blocks(); ++b) {
        alignas(64) float sums[kMaxRows * kTileOutputs];
        std::fill(sums, sums + c.a.rows(b) * kTileOutputs, 0.0f);
        dot(c, block_at(c, t, 0, c.steps), c.a.at(b, 0), c.a.rows(b), sums);
        finish(c, sums, kTileOutputs, c.a.rows_before(b), c.a.rows(b), t, 1);
      }
  });
}

// One panel: steps [first, first + count) of some tiles, for all rows.
void add_panel(const Call& c, int64_t tile, int64_t tiles, int64_t first, int64_t count, uint32_t* panel,
               int64_t tile_elements, float* sums, int64_t lds) {
  for (int64_t t = 0; t < tiles; ++t) {
    const Int4Block block = block_at(c, tile + t, first, count);
    if (c.bf16)
      c.table.int4_values_bf16(&block, reinterpret_cast<uint16_t*>(panel + t * tile_elements));
    else
      c.table.int4_values(&block, reinterpret_cast<float*>(panel + t * tile_elements));
  }
  for (int64_t b = 0; b < c.a.blocks(); ++b)
    for (int64_t t = 0; t < tiles; ++t) {
      const Int4Block block = block_at(c, tile + t, first, count);
      const void *values = panel + t * tile_elements, *a = c.a.at(b, first);
      float* to = sums + c.a.rows_before(b) * lds + t * kTileOutputs;
      if (c.bf16)
        c.table.int4_panel_bf16(&block, static_cast<const uint16_t*>(values), static_cast<const uint16_t*>(a),
                                c.a.rows(b), to, lds);
      else
        c.table.int4_panel(&block, static_cast<const float*>(values), static_cast<const float*>(a), c.a.rows(b), to,
                           lds);
    }
}

void linear_by_panels(const Call& c, int threads) {
  const int64_t tiles = tile_count(c.weight.out_features);
  // As many tasks as keep all threads busy to the end, each of at most kPanelTiles tiles.
  const int64_t tasks = std::min(tiles, round_up(ceil_div(tiles, kPanelTiles), threads));
  const int64_t bundle = ceil_div(tiles, tasks), lds = bundle * kTileOutputs;
  // Whole groups if several fit, else a part of one that divides it as evenly as it can.
  const int64_t panel_steps = c.group_steps <= kPanelSteps ? kPanelSteps / c.group_steps * c.group_steps : kPanelSteps;
  const int64_t tile_elements = panel_steps * (c.bf16 ? kStepChannels / 2 : kStepChannels) * kTileOutputs;
  const int64_t size = bundle * tile_elements + c.rows * lds;
  Buffer<uint32_t> scratch(threads * size);
  parallel_for(ceil_div(tiles, bundle), threads, [&](int64_t task, int thread) {
    uint32_t* panel = scratch.get() + thread * size;
    float* sums = reinterpret_cast<float*>(panel + bundle * tile_elements);
    std::memset(sums, 0, static_cast<size_t>(c.rows * lds) * 4);
    const int64_t tile = task * bundle, count = std::min(bundle, tiles - tile);
    for (int64_t first = 0; first < c.steps;) {
      // A part of a group ends where the group does.
      const int64_t rest = c.group_steps > kPanelSteps ? c.group_steps - first % c.group_steps : c.steps - first;
      const int64_t length = std::min({panel_steps, rest, c.steps - first});
      add_panel(c, tile, count, first, length, panel, tile_elements, sums, lds);
      first += length;
    }
    finish(c, sums, lds, 0, c.rows, tile, count);
  });
}

}  // namespace

void int4_linear(const KernelTable& table, const TiledWeight& weight, const void* x, Dtype dtype, int64_t rows,
                 const float* input_scale, const float* bias, void* y, int threads) {
  const bool bf16 = dtype == Dtype::bf16 && table.int4_dot_bf16 != nullptr;
  const bool dots = rows <= (bf16 ? kDotRowsBf16 : kDotRowsF32);
  const InputView view{x, dtype, rows, weight.in_features, input_scale};
  const Activations a(table, view, weight.group_length, bf16, dots ? table.dot_rows : table.tile_rows, threads);
  const Call call(table, weight, a, bf16, rows, dtype, bias, y);
  dots ? linear_by_dots(call, threads) : linear_by_panels(call, threads);
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
