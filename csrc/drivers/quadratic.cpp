#include "drivers/quadratic.h"

#include <algorithm>

#include "base/layout.h"

namespace awq {
namespace {

// Channels of the first factor in a block: 256 fp32 or 512 bf16, so that a panel's block (a tile wide) is 32 KiB at the
// widest level and stays in the first-level cache while the row panels stream past it; on tile registers kTileBlockK.
int64_t block_channels(const KernelTable& table, Precision precision) {
  if (precision == Precision::f32) return 256;
  return on_tiles(table.bf16_products) ? kTileBlockK / terms_of(precision) : 512;
}

}  // namespace

Precision ranking_precision(const KernelTable& table) {
  return table.bf16_products != nullptr ? Precision::bf16 : Precision::f32;
}

Precision loss_precision(const KernelTable& table, int64_t k) {
  return on_tiles(table.bf16_products) && k >= kSplitChannels ? Precision::split : Precision::f32;
}

MomentPanels::MomentPanels(const KernelTable& table, Precision precision, int64_t k)
    : table_(&table),
      precision_(precision),
      shape_(tile_shape(table, precision)),
      channels_(k),
      padded_(round_up(k, shape_.cols)) {
  data_ = Buffer<char>(offset(count()) * value_bytes(precision));
}

// Panel j holds the first (j + 1) * width rows of its `width` columns.
int64_t MomentPanels::offset(int64_t panel) const {
  const int64_t width = shape_.cols;
  return panel * (panel + 1) / 2 * width * width;
}

int64_t MomentPanels::block_count() const { return ceil_div(padded_, block_channels(*table_, precision_)); }

void MomentPanels::fill(int64_t panel, const float* g, int64_t ld) {
  const int64_t width = shape_.cols, first = panel * width, cols = std::min(width, channels_ - first);
  const int64_t length = first + width;
  // One strip of rows at a time is doubled, rounded and packed while it is in the cache.
  float strip[kMaxTileCols * kMaxTileCols];
  for (int64_t row = 0; row < length; row += width) {
    const float factor = row < first ? 2.0f : 1.0f;
    const int64_t rows = std::min(width, channels_ - row);
    if (rows < width || cols < width) std::fill_n(strip, width * width, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      const float* source = g + (row + r) * ld + first;
      for (int64_t c = 0; c < cols; ++c) strip[r * width + c] = factor * source[c];
    }
    pack_column_square(*table_, precision_, strip,
                       data_.get() + (offset(panel) + row * width) * value_bytes(precision_));
  }
}

void MomentPanels::add_block(int64_t block, const void* row_panels, const float* rows, int64_t panels,
                             double* out) const {
  const int64_t width = shape_.cols, mr = shape_.rows, size = block_channels(*table_, precision_), begin = block * size,
                bytes = value_bytes(precision_);
  for (int64_t j = begin / width; j < count(); ++j) {
    const int64_t length = std::min((j + 1) * width, begin + size) - begin;
    const int64_t at = offset(j) + begin * width;
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t a = (p * padded_ + begin) * mr;
      const float* e = rows + p * mr * row_stride() + j * width;
      add_form(*table_, precision_, static_cast<const char*>(row_panels) + a * bytes, data_.get() + at * bytes, length,
               e, row_stride(), out + p * mr);
    }
  }
}

void pack_column_square(const KernelTable& table, Precision precision, float* square, void* out) {
  const TileShape shape = tile_shape(table, precision);
  const int64_t width = shape.cols;
  if (precision == Precision::f32) {
    std::copy_n(square, width * width, static_cast<float*>(out));
    return;
  }
  const int terms = terms_of(precision);
  uint16_t halves[kMaxTileCols * kMaxTileCols];
  for (int t = 0; t < terms; ++t) {
    if (terms == 1)
      table.from_float(square, Dtype::bf16, width * width, halves);
    else
      table.bf16_products->split(square, width * width, halves);
    table.bf16_products->pack_right(halves, width, width, width, terms,
                                    static_cast<uint16_t*>(out) + t * shape.depth * width);
  }
}

void add_form(const KernelTable& table, Precision precision, const void* a, const void* b, int64_t k, const float* e,
              int64_t lde, double* out) {
  if (precision == Precision::f32)
    table.quadratic_tile(static_cast<const float*>(a), static_cast<const float*>(b), k, e, lde, out);
  else
    table.bf16_products->quadratic(static_cast<const uint16_t*>(a), static_cast<const uint16_t*>(b), k,
                                   terms_of(precision), e, lde, out);
}

int64_t row_panel_bytes(const MomentPanels& g) {
  return g.shape().rows * g.padded_channels() * value_bytes(g.precision());
}

void pack_row_panel(const KernelTable& table, Precision precision, float* rows, int64_t stride, int64_t k,
                    void* panel) {
  if (precision == Precision::f32) {
    table.pack_rows(rows, stride, k, static_cast<float*>(panel));
  } else {
    const Bf16Products& products = *table.bf16_products;
    for (int64_t r = 0; r < products.rows && precision == Precision::bf16; ++r)
      table.round_to_bf16(rows + r * stride, k);
    products.pack_rows(rows, stride, k, terms_of(precision), static_cast<uint16_t*>(panel));
  }
}

void pack_row_panel(const MomentPanels& g, float* rows, void* panel) {
  pack_row_panel(g.table(), g.precision(), rows, g.row_stride(), g.padded_channels(), panel);
}

}  // namespace awq
