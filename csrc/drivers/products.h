// The three precisions of a matrix product, and what panels have in each.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace awq {

// How factors are held: as fp32; rounded to bf16; or as kSplitTerms terms in bf16 (Bf16Products). The last two need a
// level with the kernels for them.
enum class Precision { f32, bf16, split };

constexpr int kSplitTerms = 2;

constexpr int terms_of(Precision precision) { return precision == Precision::split ? kSplitTerms : 1; }
constexpr int64_t value_bytes(Precision precision) { return precision == Precision::f32 ? 4 : 2 * terms_of(precision); }

// Outputs of a tile, and the k that its panels hold a multiple of.
struct TileShape {
  int64_t rows, cols, depth;
};

inline TileShape tile_shape(const KernelTable& table, Precision precision) {
  if (precision == Precision::f32) return {table.tile_rows, table.tile_cols, 1};
  return {table.bf16_products->rows, table.bf16_products->cols, table.bf16_products->depth};
}

// Whether panels go through tile registers, whose products are so fast that the caches limit them.
inline bool on_tiles(const Bf16Products* products) { return products != nullptr && products->split != nullptr; }
// The most k of a column panel that are multiplied at a time on tile registers, terms together: 32 columns of them take
// half of a first-level cache of 48 KiB, and the row panels stream through the other half.
constexpr int64_t kTileBlockK = 384;

// The thread's tile registers for the duration of a task. Null: the task needs none.
class ProductTask {
 public:
  explicit ProductTask(const Bf16Products* products) : products_(products) {
    if (products_ != nullptr) products_->begin();
  }
  ProductTask(const KernelTable& table, Precision precision)
      : ProductTask(precision == Precision::f32 ? nullptr : table.bf16_products) {}
  ~ProductTask() {
    if (products_ != nullptr) products_->end();
  }
  ProductTask(const ProductTask&) = delete;
  ProductTask& operator=(const ProductTask&) = delete;

 private:
  const Bf16Products* products_;
};

}  // namespace awq
