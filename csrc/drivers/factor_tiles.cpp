#include "drivers/factor_tiles.h"

#include <algorithm>

#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/feedback.h"

namespace awq {
namespace {

constexpr int64_t kBlockK = kTileBlockK / kExactTerms;
constexpr int64_t kMostPanels = 8;  // of rows of a task: they share what is read of the columns

// Some cache lines of each of many rows, far apart, which no processor prefetches by itself.
void prefetch_rows(const float* x, int64_t ldx, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(x + r * ldx + i);
}

}  // namespace

WideProducts::WideProducts(const Bf16Products& products, float* h, int64_t k, int threads)
    : products_(products),
      h_(h),
      k_(k),
      threads_(threads),
      side_(products.rows),
      columns_(k > kColumns ? round_up(k, side_) * kColumns * kExactTerms : 0),
      rows_(k > kColumns ? threads * kMostPanels * side_ * kBlockK * kExactTerms : 0) {}

void WideProducts::pack_columns(int64_t begin, int64_t end) {
  const int64_t depth = round_up(k_ - end, side_), square_size = side_ * side_ * kExactTerms;
  parallel_for(depth / side_, threads_, [&](int64_t step, int) {
    const int64_t from = end + step * side_, count = std::min(side_, k_ - from);
    for (int64_t panel = 0; panel < kColumns / side_; ++panel) {
      float square[kMaxTile] = {};
      for (int64_t n = 0; n < side_; ++n)
        for (int64_t i = 0; i < count; ++i) square[i * side_ + n] = -h_[(begin + panel * side_ + n) * k_ + from + i];
      pack_terms(products_, products_.pack_right, side_, kExactTerms, square,
                 columns_.get() + (panel * depth / side_ + step) * square_size);
    }
  });
}

void WideProducts::pack_rows(int64_t first, int64_t last, int64_t from, int64_t count, uint16_t* out) const {
  const int64_t whole = count / side_ * side_, rest = count - whole;
  for (int64_t row = first * side_; row < last * side_; row += side_) {
    const float* source = h_ + row * k_ + from;
    if (row + side_ < last * side_) prefetch_rows(source + side_ * k_, k_, side_, count);
    products_.pack_rows(source, k_, whole, kExactTerms, out);
    out += whole * side_ * kExactTerms;
    if (rest == 0) continue;
    float square[kMaxTile] = {};  // the last channels, followed by 0
    for (int64_t m = 0; m < side_; ++m) std::copy_n(source + m * k_ + whole, rest, square + m * side_);
    products_.pack_rows(square, side_, side_, kExactTerms, out);
    out += side_ * side_ * kExactTerms;
  }
}

void WideProducts::subtract(int64_t begin, int64_t end) {
  pack_columns(begin, end);
  const int64_t panels = end / side_, depth = round_up(k_ - end, side_);
  const int64_t each = std::clamp<int64_t>(panels / (int64_t{2} * threads_), 1, kMostPanels);
  parallel_for(ceil_div(panels, each), threads_, [&](int64_t task, int thread) {
    const ProductTask product_task(&products_);
    uint16_t* rows = rows_.get() + thread * kMostPanels * side_ * kBlockK * kExactTerms;
    const int64_t first = task * each, last = std::min(panels, first + each);
    for (int64_t at = 0; at < depth; at += kBlockK) {
      const int64_t count = std::min(kBlockK, k_ - end - at), padded = round_up(count, side_);
      pack_rows(first, last, end + at, count, rows);
      for (int64_t column = 0; column < kColumns / side_; ++column)
        for (int64_t p = first; p < last; ++p)
          products_.gemm(rows + (p - first) * padded * side_ * kExactTerms,
                         columns_.get() + (column * depth + at) * side_ * kExactTerms, padded, kExactTerms,
                         h_ + p * side_ * k_ + begin + column * side_, k_);
    }
  });
}

}  // namespace awq
