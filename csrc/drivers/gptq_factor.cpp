#include "drivers/gptq.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/factor_tiles.h"
#include "drivers/products.h"

namespace awq {
namespace {

constexpr int64_t kBlock = kFactorBlock;
static_assert(kBlock % kMaxTileCols == 0 && WideProducts::kColumns % kBlock == 0);
// What every channel gets in addition to its own damping, as a share of the mean: enough for channels that no input
// enters.
constexpr double kFloor = 1e-6;
// The damping is multiplied by ten until the factorization succeeds, up to this. Only moments that fp32 cannot tell
// from singular ones need that.
constexpr double kMostDamping = 1e30;

// H = R R^T in place, a block of columns at a time, from the last to the first:
//     [H_11 H_12]   [R_11 R_12] [R_11     ]^T
//     [  .  H_22] = [     R_22] [R_12 R_22]      H_22 = R_22 R_22^T, R_12 = H_12 R_22^-T, R_11 R_11^T = H_11 - R_12
//     R_12^T
// On tile registers WideProducts subtracts what columns behind a wide block give, all of its columns at once; then as
// above, within the wide block.
class Factorization {
 public:
  Factorization(const KernelTable& table, float* h, int64_t k, const double* added, int threads)
      : table_(table),
        h_(h),
        k_(k),
        added_(added),
        threads_(threads),
        wide_(on_tiles(table.bf16_products) ? WideProducts::kColumns : round_up(k, kBlock)),
        row_panels_(threads * table.tile_rows * std::min(k, wide_)),
        col_panels_(kBlock * std::min(k, wide_)) {
    if (wide_ < k) wide_products_.emplace(*table.bf16_products, h, k, threads);
  }

  // Returns whether every pivot is as large as exact arithmetic makes it, up to some rounding.
  bool run() {
    for (int64_t block = ceil_div(k_, kBlock) - 1; block >= 0; --block) {
      const int64_t begin = block * kBlock, end = std::min(k_, begin + kBlock);
      const int64_t wide_end = std::min(k_, (begin / wide_ + 1) * wide_);
      if (end == wide_end && end < k_) wide_products_->subtract(end - wide_, end);
      subtract_later(begin, end, wide_end);
      if (!factor_diagonal(begin, end)) return false;
      parallel_for(ceil_div(begin, kBlock), threads_,
                   [&](int64_t task, int) { solve_rows(task * kBlock, (task + 1) * kBlock, begin, end); });
    }
    return true;
  }

 private:
  // H[0:end, begin:end] -= R[0:end, end:last] R[begin:end, end:last]^T.
  void subtract_later(int64_t begin, int64_t end, int64_t last) {
    const int64_t depth = last - end, mr = table_.tile_rows, nr = table_.tile_cols;
    if (depth == 0) return;
    const int64_t cols = ceil_div(end - begin, nr);
    parallel_for(cols, threads_, [&](int64_t col, int) {
      float* panel = col_panels_.get() + col * nr * depth;
      const int64_t first = begin + col * nr, width = std::min(nr, end - first);
      if (width < nr) std::fill_n(panel, nr * depth, 0.0f);
      for (int64_t n = 0; n < width; ++n)
        for (int64_t i = 0; i < depth; ++i) panel[i * nr + n] = -h_[(first + n) * k_ + end + i];
    });
    parallel_for(ceil_div(end, mr), threads_, [&](int64_t row, int thread) {
      float* panel = row_panels_.get() + thread * mr * std::min(k_, wide_);
      table_.pack_rows(h_ + row * mr * k_ + end, k_, depth, panel);
      for (int64_t col = 0; col < cols; ++col) {
        const int64_t first = begin + col * nr, width = std::min(nr, end - first);
        float* out = h_ + row * mr * k_ + first;
        if (width == nr)
          table_.gemm_tile(panel, col_panels_.get() + col * nr * depth, depth, out, k_);
        else
          add_narrow_tile(panel, col_panels_.get() + col * nr * depth, depth, width, out);
      }
    });
  }

  void add_narrow_tile(const float* a, const float* b, int64_t depth, int64_t width, float* out) const {
    float tile[kMaxTile] = {};
    table_.gemm_tile(a, b, depth, tile, table_.tile_cols);
    for (int64_t m = 0; m < table_.tile_rows; ++m)
      for (int64_t n = 0; n < width; ++n) out[m * k_ + n] += tile[m * table_.tile_cols + n];
  }

  // The block on the diagonal, kept in fp64 and transposed (column after column) for solve_rows.
  bool factor_diagonal(int64_t begin, int64_t end) {
    const int64_t size = end - begin;
    double* r = diagonal_;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t j = i; j < size; ++j) r[j * kBlock + i] = h_[(begin + i) * k_ + begin + j];
    for (int64_t j = size - 1; j >= 0; --j) {
      double* column = r + j * kBlock;
      // in exact arithmetic no pivot is below what was added to the diagonal
      if (!(column[j] >= added_[begin + j] / 2.0)) return false;
      const double pivot = std::sqrt(column[j]);
      for (int64_t i = 0; i < j; ++i) column[i] /= pivot;
      column[j] = pivot;
      for (int64_t later = 0; later < j; ++later)
        for (int64_t i = 0; i <= later; ++i) r[later * kBlock + i] -= column[later] * column[i];
    }
    for (int64_t j = 0; j < size; ++j)
      for (int64_t i = 0; i <= j; ++i) {
        rounded_[j * kBlock + i] = static_cast<float>(r[j * kBlock + i]);
        h_[(begin + i) * k_ + begin + j] = rounded_[j * kBlock + i];
      }
    return true;
  }

  // Rows of R_12 = H_12 R_22^-T: x_j = (h_j - sum over i > j of x_i R_ji) / R_jj, from the last column to the first.
  void solve_rows(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    for (int64_t row = first; row < last; row += table_.tile_cols)
      table_.solve_rows(rounded_, static_cast<int>(end - begin), h_ + row * k_ + begin, k_,
                        static_cast<int>(std::min<int64_t>(table_.tile_cols, last - row)));
  }

  const KernelTable& table_;
  float* h_;
  int64_t k_;
  const double* added_;
  int threads_;
  int64_t wide_;  // columns of a wide block; in vectors all
  std::optional<WideProducts> wide_products_;
  Buffer<float> row_panels_, col_panels_;
  double diagonal_[kBlock * kBlock];
  float rounded_[kBlock * kBlock];
};

}  // namespace

int64_t factor_rows(const KernelTable& table, int64_t in_features) { return round_up(in_features, table.tile_rows); }

void gptq_factor(const KernelTable& table, const float* moment, int64_t in_features, const int64_t* order,
                 double damping, float* factor, int threads) {
  const int64_t k = in_features;
  double total = 0.0;
  for (int64_t i = 0; i < k; ++i) total += moment[i * k + i];
  // without any input every positive number gives plain rounding
  const double floor = kFloor * (total > 0.0 ? total / static_cast<double>(k) : 1.0);
  std::vector<double> added(static_cast<size_t>(k));
  bool done = false;
  for (double more = 1.0; more < kMostDamping && !done; more *= 10.0) {
    parallel_for(k, threads, [&](int64_t i, int) {
      for (int64_t j = i; j < k; ++j) factor[i * k + j] = moment[order[i] * k + order[j]];
      const double extra = more * (damping * std::max(factor[i * k + i], 0.0f) + floor);
      added[static_cast<size_t>(i)] = extra;
      factor[i * k + i] += static_cast<float>(extra);
    });
    std::fill_n(factor + k * k, (factor_rows(table, k) - k) * k, 0.0f);
    done = Factorization(table, factor, k, added.data(), threads).run();
  }
  parallel_for(k, threads, [&](int64_t i, int) { std::fill_n(factor + i * k, i, 0.0f); });
}

}  // namespace awq
