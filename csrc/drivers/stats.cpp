#include "drivers/stats.h"

#include <algorithm>
#include <cmath>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/products.h"

namespace awq {
namespace {

// Rows that are packed and multiplied at a time. The sums of a chunk stay in registers, so longer chunks save passes
// over the K x K result; a column panel of a chunk (64 KiB at the widest level) must stay in the second-level cache.
constexpr int64_t kChunkRows = 512, kChunkRowsBf16 = 1024;
// A task multiplies `rows` row panels, which stay in the second-level cache, with `cols` column panels. Tiles of 32 x
// 32 leave registers more often (kTileBlockK), and the task's part of the result must stay there too: with 1024 rows of
// 12 and of 8 panels it takes 1.7 of 2 MiB.
struct Bundle {
  int64_t rows, cols;
};
constexpr Bundle kBundle = {18, 8}, kTileBundle = {12, 8};

// How the rows of one call are multiplied.
struct Form {
  const KernelTable& table;
  const Bf16Products* products;  // null: fp32
  int terms;                     // of each number, in bf16
  TileShape tile;
  int64_t chunk_rows, block_rows;  // packed at a time, multiplied at a time
  Bundle bundle;

  int64_t value_bytes() const { return products == nullptr ? 4 : 2 * terms; }
};

bool is_power_of_2(float weight) {
  int exponent;
  return weight == 0.0f || (std::isnormal(weight) && std::frexp(weight, &exponent) == 0.5f);
}

// Whether w x is a bf16 number for each row, so that products of x with w x are those of one term.
bool weights_keep_bf16(const CalibrationRows& x) {
  return x.weights != nullptr && x.dtype == Dtype::bf16 && std::all_of(x.weights, x.weights + x.rows, is_power_of_2);
}

Form form_of(const KernelTable& table, const CalibrationRows& x) {
  const Bf16Products* products = table.bf16_products;
  const bool rooted = x.weights != nullptr && !weights_keep_bf16(x);
  const int terms = rooted || x.dtype == Dtype::f32 ? 3 : x.dtype == Dtype::f16 ? 2 : 1;
  if (products == nullptr || (terms > 1 && products->split == nullptr))
    return {table, nullptr, 1, tile_shape(table, Precision::f32), kChunkRows, kChunkRows, kBundle};
  const TileShape tile = tile_shape(table, Precision::bf16);
  const int64_t chunk = kChunkRowsBf16 / terms / tile.depth * tile.depth;
  if (!on_tiles(products)) return {table, products, terms, tile, chunk, chunk, kBundle};
  return {table, products, terms, tile, chunk, kTileBlockK / terms, kTileBundle};
}

// One chunk of rows, packed twice: columns as the tile's rows and as the tile's columns.
struct Chunk {
  const Form& form;
  int64_t in_features;
  int64_t depth;  // rows, up to whole depths of a tile
  char* row_panels;
  char* col_panels;

  // Adds the products of rows first .. first + count of the chunk.
  void add_tile(int64_t row_panel, int64_t col_panel, int64_t first, int64_t count, float* c, int64_t ldc) const {
    const void* a = row_panels + (row_panel * depth + first) * form.tile.rows * form.value_bytes();
    const void* b = col_panels + (col_panel * depth + first) * form.tile.cols * form.value_bytes();
    if (form.products != nullptr)
      form.products->gemm(static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), count, form.terms, c, ldc);
    else
      form.table.gemm_tile(static_cast<const float*>(a), static_cast<const float*>(b), count, c, ldc);
  }

  // A tile that reaches past the matrix goes through a buffer.
  void add_edge_tile(int64_t row_panel, int64_t col_panel, int64_t first, int64_t count, float* moment) const {
    float tile[kMaxTile] = {};
    const int64_t mr = form.tile.rows, nr = form.tile.cols, i = row_panel * mr, j = col_panel * nr;
    add_tile(row_panel, col_panel, first, count, tile, nr);
    for (int64_t m = 0; m < std::min(mr, in_features - i); ++m)
      for (int64_t n = 0; n < std::min(nr, in_features - j); ++n)
        moment[(i + m) * in_features + j + n] += tile[m * nr + n];
  }

  // Adds the tiles of the task's panels that reach the diagonal or lie above it.
  void add_block(int64_t row, int64_t col, int64_t first, int64_t count, float* moment) const {
    const int64_t mr = form.tile.rows, nr = form.tile.cols;
    const int64_t row_end = std::min(ceil_div(in_features, mr), row + form.bundle.rows);
    const int64_t col_end = std::min(ceil_div(in_features, nr), col + form.bundle.cols);
    for (int64_t j = col; j < col_end; ++j)
      for (int64_t i = row; i < row_end && i * mr < (j + 1) * nr; ++i) {
        const bool inside = (i + 1) * mr <= in_features && (j + 1) * nr <= in_features;
        if (inside)
          add_tile(i, j, first, count, moment + i * mr * in_features + j * nr, in_features);
        else
          add_edge_tile(i, j, first, count, moment);
      }
  }
};

// Rows ready to be packed: x itself, a copy in fp32 times the roots of the weights, or the terms of that; or x, and
// w x for the tile's columns.
struct Source {
  const void* left;
  const void* right;
  int64_t term_values;  // from one term to the next
};

// Packs the chunk both ways, in one parallel region.
void pack_chunk(const Chunk& chunk, const Source& x, int64_t rows, int threads) {
  const Form& form = chunk.form;
  const int64_t k = chunk.in_features, mr = form.tile.rows, nr = form.tile.cols;
  const int64_t row_count = ceil_div(k, mr), col_count = ceil_div(k, nr);
  parallel_for(row_count + col_count, threads, [&](int64_t task, int) {
    const bool left = task < row_count;
    const int64_t width = left ? mr : nr, first = (left ? task : task - row_count) * width;
    const int64_t cols = std::min(width, k - first);
    char* out = (left ? chunk.row_panels : chunk.col_panels) + first * chunk.depth * form.value_bytes();
    if (form.products == nullptr) {
      const float* from = static_cast<const float*>(x.left) + first;
      return form.table.pack_columns(from, k, rows, cols, width, reinterpret_cast<float*>(out));
    }
    const auto pack = left ? form.products->pack_left : form.products->pack_right;
    for (int t = 0; t < form.terms; ++t)
      pack(static_cast<const uint16_t*>(left ? x.left : x.right) + t * x.term_values + first, k, rows, cols, form.terms,
           reinterpret_cast<uint16_t*>(out) + t * form.tile.depth * width);
  });
}

void add_chunk(const Chunk& chunk, float* moment, int threads) {
  const Form& form = chunk.form;
  const int64_t row_blocks = ceil_div(ceil_div(chunk.in_features, form.tile.rows), form.bundle.rows);
  const int64_t col_blocks = ceil_div(ceil_div(chunk.in_features, form.tile.cols), form.bundle.cols);
  parallel_for(row_blocks * col_blocks, threads, [&](int64_t task, int) {
    const ProductTask product_task(form.products);
    const int64_t row = task / col_blocks * form.bundle.rows, col = task % col_blocks * form.bundle.cols;
    for (int64_t first = 0; first < chunk.depth; first += form.block_rows)
      chunk.add_block(row, col, first, std::min(form.block_rows, chunk.depth - first), moment);
  });
}

// Rows that have to be copied before they can be packed.
class Copies {
 public:
  Copies(const Form& form, const CalibrationRows& x, int64_t most_rows, int threads)
      : form_(form),
        x_(x),
        threads_(threads),
        kind_(kind_of(form, x)),
        values_(kind_ == Kind::floats ? most_rows * x.in_features
                : kind_ == Kind::none ? 0
                                      : threads * x.in_features),
        halves_(kind_ == Kind::terms || kind_ == Kind::scaled ? form.terms * most_rows * x.in_features : 0) {}

  // Of rows first .. first + count.
  Source make(int64_t first, int64_t count) {
    const void* rows = x_.row(first);
    if (kind_ == Kind::none) return {rows, rows, 0};
    const int64_t k = x_.in_features, term_values = count * k;
    parallel_for(count, threads_, [&](int64_t r, int thread) {
      float* row = values_.get() + (kind_ == Kind::floats ? r : thread) * k;
      load(first + r, row);
      if (kind_ == Kind::scaled) form_.table.from_float(row, Dtype::bf16, k, halves_.get() + r * k);
      if (kind_ != Kind::terms) return;
      for (int t = 0; t < form_.terms; ++t) form_.products->split(row, k, halves_.get() + t * term_values + r * k);
    });
    if (kind_ == Kind::floats) return {values_.get(), values_.get(), 0};
    return {kind_ == Kind::scaled ? rows : halves_.get(), halves_.get(), term_values};
  }

 private:
  enum class Kind { none, floats, terms, scaled };

  static Kind kind_of(const Form& form, const CalibrationRows& x) {
    const bool plain = x.weights == nullptr;
    if (form.products == nullptr) return plain && x.dtype == Dtype::f32 ? Kind::none : Kind::floats;
    if (form.terms > 1) return Kind::terms;
    return plain ? Kind::none : Kind::scaled;
  }

  // A row in fp32 times its weight where that is exact, else times the root of that.
  void load(int64_t r, float* row) const {
    const int64_t k = x_.in_features;
    form_.table.to_float(x_.row(r), x_.dtype, k, row);
    if (x_.roots == nullptr) return;
    const float factor = kind_ == Kind::scaled ? x_.weights[r] : x_.roots[r];
    for (int64_t i = 0; i < k; ++i) row[i] *= factor;
  }

  const Form& form_;
  const CalibrationRows& x_;
  int threads_;
  Kind kind_;
  Buffer<float> values_;     // of each thread, or of each row
  Buffer<uint16_t> halves_;  // [terms][rows][in_features]
};

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
  const Form form = form_of(table, x);
  const int64_t k = x.in_features, most = std::min(x.rows, form.chunk_rows);
  const int64_t depth = round_up(most, form.tile.depth) * form.value_bytes();
  Buffer<char> row_panels(depth * round_up(k, form.tile.rows)), col_panels(depth * round_up(k, form.tile.cols));
  Copies copies(form, x, most, threads);
  for (int64_t first = 0; first < x.rows; first += most) {
    const int64_t count = std::min(most, x.rows - first);
    const Chunk chunk{form, k, round_up(count, form.tile.depth), row_panels.get(), col_panels.get()};
    pack_chunk(chunk, copies.make(first, count), count, threads);
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
