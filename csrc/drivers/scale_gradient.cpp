#include "drivers/scale_gradient.h"

#include <algorithm>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/products.h"

namespace awq {
namespace {

// Rows that are packed at a time: panels of so many of them stay in the second-level cache.
constexpr int64_t kChunkRows = 512;

// Operands and layout of one call. A left panel holds channels of one group, so that a tile of products belongs to one
// scale of each output; a right panel holds outputs of one tile of the weight.
struct Plan {
  const KernelTable& table;
  const TiledWeight& weight;
  const Bf16Products* products;  // null: fp32
  TileShape tile;
  int64_t groups, group_panels, panels;  // panels of a whole group, and of all groups

  Plan(const KernelTable& table, const TiledWeight& w, bool bf16)
      : table(table),
        weight(w),
        products(bf16 ? table.bf16_products : nullptr),
        tile(tile_shape(table, products == nullptr ? Precision::f32 : Precision::bf16)),
        groups(ceil_div(w.in_features, w.group_length)),
        group_panels(ceil_div(w.group_length, tile.rows)),
        panels((groups - 1) * group_panels + ceil_div(channels(groups - 1), tile.rows)) {}

  int64_t value_bytes() const { return products == nullptr ? 4 : 2; }
  int64_t channels(int64_t group) const {
    return std::min(weight.group_length, weight.in_features - group * weight.group_length);
  }
  int64_t right_panels() const { return ceil_div(weight.out_features, tile.cols); }
};

// Some rows of x and of the gradient: as they are in bf16, otherwise in fp32.
struct Rows {
  const void* x;
  const void* gradient;
  int64_t count;
};

// The rows packed: a panel is [depth][width].
struct Panels {
  int64_t depth;
  char* left;
  char* right;
};

void pack(const Plan& p, const Rows& rows, const Panels& panels, int threads) {
  const int64_t bytes = p.value_bytes(), lefts = p.panels, k = p.weight.in_features, n = p.weight.out_features;
  parallel_for(lefts + p.right_panels(), threads, [&](int64_t task, int) {
    const bool left = task < lefts;
    const int64_t index = left ? task : task - lefts, width = left ? p.tile.rows : p.tile.cols, ld = left ? k : n;
    const int64_t group = index / p.group_panels, within = index % p.group_panels * p.tile.rows;
    const int64_t first = left ? group * p.weight.group_length + within : index * width;
    const int64_t cols = std::min(width, left ? p.channels(group) - within : n - first);
    const char* from = static_cast<const char*>(left ? rows.x : rows.gradient) + first * bytes;
    char* out = (left ? panels.left : panels.right) + index * panels.depth * width * bytes;
    if (p.products == nullptr)
      return p.table.pack_columns(reinterpret_cast<const float*>(from), ld, rows.count, cols, width,
                                  reinterpret_cast<float*>(out));
    const auto pack = left ? p.products->pack_left : p.products->pack_right;
    pack(reinterpret_cast<const uint16_t*>(from), ld, rows.count, cols, 1, reinterpret_cast<uint16_t*>(out));
  });
}

// c = one tile of x^T gradient, of a left panel and all right ones of a tile of the weight: [tile.rows][32].
void multiply(const Plan& p, const Panels& panels, int64_t left, int64_t tile, float* c) {
  std::fill_n(c, p.tile.rows * kTileOutputs, 0.0f);
  const int64_t bytes = p.value_bytes(), each = kTileOutputs / p.tile.cols;
  const char* a = panels.left + left * panels.depth * p.tile.rows * bytes;
  for (int64_t q = 0; q < each && tile * each + q < p.right_panels(); ++q) {
    const char* b = panels.right + (tile * each + q) * panels.depth * p.tile.cols * bytes;
    float* to = c + q * p.tile.cols;
    if (p.products == nullptr)
      p.table.gemm_tile(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b), panels.depth, to,
                        kTileOutputs);
    else
      p.products->gemm(reinterpret_cast<const uint16_t*>(a), reinterpret_cast<const uint16_t*>(b), panels.depth, 1, to,
                       kTileOutputs);
  }
}

// sum[j] += sum over `count` rows of a[., j] * b[., j], both [count][32].
void add_products(const float* a, const float* b, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; ++i, a += kTileOutputs, b += kTileOutputs)
    for (int64_t j = 0; j < kTileOutputs; ++j) sum[j] += a[j] * b[j];
}

// Adds what the packed rows give for one tile of 32 outputs. values: room for a group's codes, [channels + 4][32].
void add_tile(const Plan& p, const Panels& panels, int64_t tile, float* values, float* out) {
  const TiledWeight& w = p.weight;
  const int64_t n = tile * kTileOutputs, count = std::min(kTileOutputs, w.out_features - n);
  const uint8_t* codes = w.codes + tile * step_count(w.in_features, w.group_length) * step_bytes(w.bits);
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t channels = p.channels(g), steps = ceil_div(channels, kStepChannels), place = tile * p.groups + g;
    const WeightBlock block{codes,
                            w.scales + place * kTileOutputs,
                            w.zeros + place * tile_zero_bytes(w.bits),
                            w.scale_dtype,
                            1,
                            steps,
                            steps,
                            w.bits};
    p.table.panel_values(&block, values);
    float sum[kTileOutputs] = {};
    alignas(64) float c[kMaxTile];
    for (int64_t first = 0; first < channels; first += p.tile.rows) {
      multiply(p, panels, g * p.group_panels + first / p.tile.rows, tile, c);
      add_products(c, values + first * kTileOutputs, std::min(p.tile.rows, channels - first), sum);
    }
    for (int64_t j = 0; j < count; ++j) out[(n + j) * p.groups + g] += sum[j];
    codes += steps * step_bytes(w.bits);
  }
}

// Rows in fp32, x times input_scale.
Rows converted(const KernelTable& table, const Rows& given, Dtype dtype, int64_t n, int64_t k, const float* input_scale,
               float* to, int threads) {
  float* const gradients = to + given.count * k;
  parallel_for(given.count, threads, [&](int64_t r, int) {
    const auto row = [&](const void* from, int64_t width) {
      return static_cast<const char*>(from) + r * width * dtype_bytes(dtype);
    };
    table.to_float(row(given.x, k), dtype, k, to + r * k);
    if (input_scale != nullptr) table.multiply(to + r * k, input_scale, k, to + r * k);
    table.to_float(row(given.gradient, n), dtype, n, gradients + r * n);
  });
  return {to, gradients, given.count};
}

}  // namespace

void scale_gradient(const KernelTable& table, const TiledWeight& weight, const void* gradient, const void* x,
                    Dtype dtype, int64_t rows, const float* input_scale, float* out, int threads) {
  const int64_t n = weight.out_features, k = weight.in_features;
  const bool bf16 = dtype == Dtype::bf16 && input_scale == nullptr && table.bf16_products != nullptr;
  const Plan plan(table, weight, bf16);
  std::fill_n(out, n * plan.groups, 0.0f);
  if (rows == 0) return;
  const int64_t most = std::min(rows, kChunkRows), depth = round_up(most, plan.tile.depth);
  const bool copies = !bf16 && (dtype != Dtype::f32 || input_scale != nullptr);
  Buffer<float> floats(copies ? most * (k + n) : 0);
  Buffer<char> left(plan.panels * plan.tile.rows * depth * plan.value_bytes());
  Buffer<char> right(plan.right_panels() * plan.tile.cols * depth * plan.value_bytes());
  const int64_t size = (weight.group_length + kStepChannels) * kTileOutputs;
  Buffer<float> values(threads * size);
  for (int64_t first = 0; first < rows; first += most) {
    const auto at = [&](const void* from, int64_t width) {
      return static_cast<const char*>(from) + first * width * dtype_bytes(dtype);
    };
    Rows part{at(x, k), at(gradient, n), std::min(most, rows - first)};
    if (copies) part = converted(table, part, dtype, n, k, input_scale, floats.get(), threads);
    const Panels panels{round_up(part.count, plan.tile.depth), left.get(), right.get()};
    pack(plan, part, panels, threads);
    parallel_for(tile_count(n), threads, [&](int64_t tile, int thread) {
      const ProductTask product_task(plan.products);
      add_tile(plan, panels, tile, values.get() + thread * size, out);
    });
  }
}

}  // namespace awq
