#include "drivers/stats.h"

#include <algorithm>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"

namespace awq {
namespace {

// Rows that are packed and multiplied at a time. The sums of a chunk stay in registers, so longer chunks save passes
// over the K x K result; a column panel of a chunk (64 KiB at the widest level) must stay in the second-level cache.
constexpr int64_t kChunkRows = 512, kChunkRowsBf16 = 1024;
// A task multiplies kRowPanels row panels, which stay in the second-level cache, with kColPanels column panels.
constexpr int64_t kRowPanels = 18, kColPanels = 8;

// One chunk of rows, packed twice: columns as the tile's rows and as the tile's columns.
struct Chunk {
  const KernelTable& table;
  bool pairs;  // bf16 pairs instead of fp32
  int64_t in_features;
  int64_t depth;  // rows, even when in pairs
  const char* row_panels;
  const char* col_panels;

  int64_t value_bytes() const { return pairs ? 2 : 4; }

  void add_tile(int64_t row_panel, int64_t col_panel, float* c, int64_t ldc) const {
    const void* a = row_panels + row_panel * depth * table.tile_rows * value_bytes();
    const void* b = col_panels + col_panel * depth * table.tile_cols * value_bytes();
    if (pairs)
      table.gemm_tile_bf16(static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), depth, c, ldc);
    else
      table.gemm_tile(static_cast<const float*>(a), static_cast<const float*>(b), depth, c, ldc);
  }

  // A tile that reaches past the matrix goes through a buffer.
  void add_edge_tile(int64_t row_panel, int64_t col_panel, float* moment) const {
    float tile[kMaxTile] = {};
    const int64_t mr = table.tile_rows, nr = table.tile_cols, i = row_panel * mr, j = col_panel * nr;
    add_tile(row_panel, col_panel, tile, nr);
    for (int64_t m = 0; m < std::min(mr, in_features - i); ++m)
      for (int64_t n = 0; n < std::min(nr, in_features - j); ++n)
        moment[(i + m) * in_features + j + n] += tile[m * nr + n];
  }

  // Adds the tiles of the task's panels that reach the diagonal or lie above it.
  void add_block(int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end, float* moment) const {
    const int64_t mr = table.tile_rows, nr = table.tile_cols;
    for (int64_t j = col_begin; j < col_end; ++j)
      for (int64_t i = row_begin; i < row_end && i * mr < (j + 1) * nr; ++i) {
        const bool inside = (i + 1) * mr <= in_features && (j + 1) * nr <= in_features;
        if (inside)
          add_tile(i, j, moment + i * mr * in_features + j * nr, in_features);
        else
          add_edge_tile(i, j, moment);
      }
  }
};

// Packs columns first .. first + width of a chunk as panel first / width of `out`.
void pack_panel(const Chunk& chunk, const void* x, int64_t rows, int64_t first, int64_t width, char* out) {
  const int64_t k = chunk.in_features, cols = std::min(width, k - first), at = first * chunk.depth;
  if (chunk.pairs) {
    chunk.table.pack_column_pairs(static_cast<const uint16_t*>(x) + first, k, rows, cols, width,
                                  reinterpret_cast<uint16_t*>(out) + at);
  } else {
    chunk.table.pack_columns(static_cast<const float*>(x) + first, k, rows, cols, width,
                             reinterpret_cast<float*>(out) + at);
  }
}

// Packs `rows` rows both ways, in one parallel region.
void pack_chunk(const Chunk& chunk, const void* x, int64_t rows, char* row_panels, char* col_panels, int threads) {
  const int64_t mr = chunk.table.tile_rows, nr = chunk.table.tile_cols;
  const int64_t row_count = ceil_div(chunk.in_features, mr), col_count = ceil_div(chunk.in_features, nr);
  parallel_for(row_count + col_count, threads, [&](int64_t task, int) {
    if (task < row_count)
      pack_panel(chunk, x, rows, task * mr, mr, row_panels);
    else
      pack_panel(chunk, x, rows, (task - row_count) * nr, nr, col_panels);
  });
}

void add_chunk(const Chunk& chunk, float* moment, int threads) {
  const int64_t mr = chunk.table.tile_rows, nr = chunk.table.tile_cols;
  const int64_t row_panels = ceil_div(chunk.in_features, mr), col_panels = ceil_div(chunk.in_features, nr);
  const int64_t row_blocks = ceil_div(row_panels, kRowPanels), col_blocks = ceil_div(col_panels, kColPanels);
  parallel_for(row_blocks * col_blocks, threads, [&](int64_t task, int) {
    const int64_t row = task / col_blocks * kRowPanels, col = task % col_blocks * kColPanels;
    chunk.add_block(row, std::min(row_panels, row + kRowPanels), col, std::min(col_panels, col + kColPanels), moment);
  });
}

// Rows [first, first + count) ready to be packed: x itself, or a copy in fp32 times the roots of their weights.
const void* packable(const KernelTable& table, const CalibrationRows& x, bool copy, int64_t first, int64_t count,
                     float* copied, int threads) {
  if (!copy) return x.row(first);
  const int64_t k = x.in_features;
  parallel_for(count, threads, [&](int64_t r, int) {
    float* row = copied + r * k;
    table.to_float(x.row(first + r), x.dtype, k, row);
    if (x.roots == nullptr) return;
    const float root = x.roots[first + r];
    for (int64_t i = 0; i < k; ++i) row[i] *= root;
  });
  return copied;
}

}  // namespace

void add_sums(const KernelTable& table, const CalibrationRows& x, double* sum, double* abs_sum, int threads) {
  constexpr int64_t kStrip = 512;  // columns: their sums stay in the first-level cache
  parallel_for(ceil_div(x.in_features, kStrip), threads, [&](int64_t strip, int) {
    float values[kSumRows * kStrip], weights[kSumRows] = {}, roots[kSumRows] = {};
    const int64_t first = strip * kStrip, cols = std::min(kStrip, x.in_features - first);
    for (int64_t r = 0; r < x.rows; r += kSumRows) {
      const int64_t count = std::min<int64_t>(kSumRows, x.rows - r);
      for (int64_t i = 0; i < count; ++i) table.to_float(x.at(r + i, first), x.dtype, cols, values + i * cols);
      std::fill_n(values + count * cols, (kSumRows - count) * cols, 0.0f);  // adding 0 changes no sum
      if (x.weights == nullptr) {
        table.add_sums(values, cols, sum + first, abs_sum + first);
        continue;
      }
      std::copy_n(x.weights + r, count, weights);
      std::copy_n(x.roots + r, count, roots);
      table.add_weighted_sums(values, weights, roots, cols, sum + first, abs_sum + first);
    }
  });
}

void add_second_moment(const KernelTable& table, const CalibrationRows& x, float* moment, int threads) {
  if (x.rows == 0) return;
  const bool pairs = x.dtype == Dtype::bf16 && x.weights == nullptr && table.gemm_tile_bf16 != nullptr;
  const bool copy = !pairs && (x.dtype != Dtype::f32 || x.weights != nullptr);
  const int64_t k = x.in_features, value_bytes = pairs ? 2 : 4;
  const int64_t chunk_rows = std::min(x.rows, pairs ? kChunkRowsBf16 : kChunkRows), depth = round_up(chunk_rows, 2);
  Buffer<char> row_panels(depth * round_up(k, table.tile_rows) * value_bytes);
  Buffer<char> col_panels(depth * round_up(k, table.tile_cols) * value_bytes);
  Buffer<float> copied(copy ? chunk_rows * k : 0);
  for (int64_t first = 0; first < x.rows; first += chunk_rows) {
    const int64_t count = std::min(chunk_rows, x.rows - first);
    const void* source = packable(table, x, copy, first, count, copied.get(), threads);
    const int64_t depth_used = pairs ? round_up(count, 2) : count;
    const Chunk chunk{table, pairs, k, depth_used, row_panels.get(), col_panels.get()};
    pack_chunk(chunk, source, count, row_panels.get(), col_panels.get(), threads);
    add_chunk(chunk, moment, threads);
  }
}

void scale_moment(float* moment, int64_t in_features, float factor, int threads) {
  parallel_for(in_features, threads, [&](int64_t row, int) {
    for (int64_t i = row * in_features; i < (row + 1) * in_features; ++i) moment[i] *= factor;
  });
}

void mirror_upper(float* moment, int64_t in_features, int threads) {
  constexpr int64_t kSide = 64;  // two squares of 16 KiB in the first-level cache
  const int64_t side = ceil_div(in_features, kSide);
  parallel_for(side, threads, [&](int64_t row_block, int) {
    const int64_t row_end = std::min(in_features, (row_block + 1) * kSide);
    for (int64_t col_block = 0; col_block <= row_block; ++col_block)
      for (int64_t j = row_block * kSide; j < row_end; ++j)
        for (int64_t i = col_block * kSide; i < std::min(j, (col_block + 1) * kSide); ++i)
          moment[j * in_features + i] = moment[i * in_features + j];
  });
}

}  // namespace awq
