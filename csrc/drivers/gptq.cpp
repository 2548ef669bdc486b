#include "drivers/gptq.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"

namespace awq {
namespace {

// Columns of the factor that are finished at a time: a multiple of every level's tile_cols, and few enough that the
// triangular solve, which is not done by tiles, stays a small share.
constexpr int64_t kBlock = 64;
static_assert(kBlock % kMaxTileCols == 0);
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
class Factorization {
 public:
  Factorization(const KernelTable& table, float* h, int64_t k, const double* added, int threads)
      : table_(table),
        h_(h),
        k_(k),
        added_(added),
        threads_(threads),
        row_panels_(threads * table.tile_rows * k),
        col_panels_(kBlock * k) {}

  // Returns whether every pivot is as large as exact arithmetic makes it, up to some rounding.
  bool run() {
    for (int64_t block = ceil_div(k_, kBlock) - 1; block >= 0; --block) {
      const int64_t begin = block * kBlock, end = std::min(k_, begin + kBlock);
      subtract_later(begin, end);
      if (!factor_diagonal(begin, end)) return false;
      parallel_for(ceil_div(begin, kBlock), threads_,
                   [&](int64_t task, int) { solve_rows(task * kBlock, (task + 1) * kBlock, begin, end); });
    }
    return true;
  }

 private:
  // H[0:end, begin:end] -= R[0:end, end:k] R[begin:end, end:k]^T.
  void subtract_later(int64_t begin, int64_t end) {
    const int64_t depth = k_ - end, mr = table_.tile_rows, nr = table_.tile_cols;
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
      float* panel = row_panels_.get() + thread * mr * k_;
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
    const int64_t size = end - begin;
    for (int64_t row = first; row < last; ++row) {
      float* x = h_ + row * k_ + begin;
      for (int64_t j = size - 1; j >= 0; --j) {
        const float* column = rounded_ + j * kBlock;
        const float value = x[j] /= column[j];
        for (int64_t i = 0; i < j; ++i) x[i] -= value * column[i];
      }
    }
  }

  const KernelTable& table_;
  float* h_;
  int64_t k_;
  const double* added_;
  int threads_;
  Buffer<float> row_panels_, col_panels_;
  double diagonal_[kBlock * kBlock];
  float rounded_[kBlock * kBlock];
};

// The factor as panels of tile_rows columns, each down to the end of its diagonal block.
class FactorPanels {
 public:
  FactorPanels(const KernelTable& table, const float* factor, int64_t k, const int64_t* order,
               const float* channel_scale, int threads)
      : width_(table.tile_rows), count_(ceil_div(k, width_)), data_(count_ * (count_ + 1) / 2 * width_ * width_) {
    parallel_for(count_, threads, [&](int64_t task, int) {
      const int64_t j = count_ - 1 - task, rows = std::min(k, (j + 1) * width_);
      float* panel = data_.get() + offset(j);
      table.pack_columns(factor + j * width_, k, rows, std::min(width_, k - j * width_), width_, panel);
      if (channel_scale == nullptr) return;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < width_; ++c) panel[i * width_ + c] /= channel_scale[order[i]];
    });
  }

  int64_t count() const { return count_; }
  // The rows of panel j above its diagonal block; below, that block itself.
  const float* above(int64_t j) const { return data_.get() + offset(j); }
  const float* diagonal(int64_t j) const { return above(j) + j * width_ * width_; }

 private:
  int64_t offset(int64_t j) const { return j * (j + 1) / 2 * width_ * width_; }

  int64_t width_;
  int64_t count_;
  Buffer<float> data_;
};

// Buffers of a panel of tile_cols weight rows, channels outermost: [K][tile_cols] unless said otherwise.
class RowPanel {
 public:
  RowPanel(const KernelTable& table, const QuantSpec& spec, int64_t k)
      : table_(table),
        spec_(spec),
        k_(k),
        groups_(ceil_div(k, spec.group_length)),
        weights_(k * table.tile_cols),
        errors_(k * table.tile_cols),
        steps_(groups_ * table.tile_cols),
        zeros_(groups_ * table.tile_cols),
        codes_(k * table.tile_cols),
        row_(k) {}

  // Loads rows first .. first + count of the weight, scaled, and their grids, which also go to scales and zeros [N, G].
  void load(const WeightView& weight, int64_t first, int64_t count, const float* channel_scale, const float* clip,
            const int64_t* position, uint16_t* scales, uint8_t* zeros) {
    const int64_t width = table_.tile_cols;
    if (count < width) {  // missing rows: weights of 0 on a grid of step 1
      std::fill_n(weights_.get(), k_ * width, 0.0f);
      std::fill_n(steps_.get(), groups_ * width, 1.0f);
      std::fill_n(zeros_.get(), groups_ * width, 0.0f);
    }
    float* row = row_.get();
    for (int64_t r = 0; r < count; ++r) {
      table_.to_float(weight.row(first + r), weight.dtype, k_, row);
      if (channel_scale != nullptr) table_.multiply(row, channel_scale, k_, row);
      for (int64_t i = 0; i < k_; ++i) weights_.get()[position[i] * width + r] = row[i];
      for (int64_t g = 0; g < groups_; ++g) {
        const int64_t begin = g * spec_.group_length, at = (first + r) * groups_ + g;
        const Range range = table_.group_range(row + begin, std::min(spec_.group_length, k_ - begin));
        const Grid grid = make_grid(table_, range, clip == nullptr ? 1.0f : clip[at], spec_);
        steps_.get()[g * width + r] = grid.step;
        zeros_.get()[g * width + r] = grid.zero;
        scales[at] = grid.scale_bits;
        zeros[at] = static_cast<uint8_t>(grid.zero);
      }
    }
  }

  // Rounds the channels of factor panel j; those of the panels before it are done.
  void round(const FactorPanels& factor, int64_t j, const int64_t* order, const int64_t* group_of) {
    const int64_t width = table_.tile_cols, mr = table_.tile_rows, begin = j * mr;
    float sums[kMaxTile] = {};
    table_.gemm_tile(factor.above(j), errors_.get(), begin, sums, width);
    const GptqPanel panel{static_cast<int>(std::min(mr, k_ - begin)),
                          factor.diagonal(j),
                          weights_.get() + begin * width,
                          steps_.get(),
                          zeros_.get(),
                          order + begin,
                          group_of + begin,
                          static_cast<float>((1 << spec_.bits) - 1),
                          false};
    table_.gptq_panel(&panel, sums, errors_.get() + begin * width, codes_.get());
  }

  void store(int64_t count, uint8_t* codes) const {
    constexpr int64_t kStrip = 64;  // a cache line of each row at a time
    const int64_t width = table_.tile_cols;
    for (int64_t begin = 0; begin < k_; begin += kStrip)
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = begin; i < std::min(k_, begin + kStrip); ++i) codes[r * k_ + i] = codes_.get()[i * width + r];
  }

 private:
  const KernelTable& table_;
  const QuantSpec& spec_;
  int64_t k_;
  int64_t groups_;
  Buffer<float> weights_, errors_, steps_, zeros_;
  Buffer<uint8_t> codes_;  // by original channel
  Buffer<float> row_;
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

void gptq_quantize(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                   const float* channel_scale, const float* clip, const float* factor, const int64_t* order,
                   uint8_t* codes, uint16_t* scales, uint8_t* zeros, int threads) {
  constexpr int64_t kErrorFloats = 1 << 18;  // errors of a task: with a panel of the factor in the second-level cache
  const int64_t k = weight.in_features, n = weight.out_features, width = table.tile_cols;
  std::vector<int64_t> position(static_cast<size_t>(k)), group_of(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; ++i) {
    position[static_cast<size_t>(order[i])] = i;
    group_of[static_cast<size_t>(i)] = order[i] / spec.group_length;
  }
  const FactorPanels panels(table, factor, k, order, channel_scale, threads);
  // Row panels of a task share each factor panel, but every thread should have several tasks.
  const int64_t total = ceil_div(n, width);
  const int64_t share = std::clamp<int64_t>(kErrorFloats / (k * width), 1, ceil_div(total, int64_t{4} * threads));
  std::vector<RowPanel> rows;
  for (int64_t i = 0; i < threads * share; ++i) rows.emplace_back(table, spec, k);
  parallel_for(ceil_div(total, share), threads, [&](int64_t task, int thread) {
    RowPanel* mine = rows.data() + thread * share;
    const int64_t begin = task * share, count = std::min(share, total - begin);
    const auto rows_of = [&](int64_t p) { return std::min(width, n - (begin + p) * width); };
    for (int64_t p = 0; p < count; ++p)
      mine[p].load(weight, (begin + p) * width, rows_of(p), channel_scale, clip, position.data(), scales, zeros);
    for (int64_t j = 0; j < panels.count(); ++j)
      for (int64_t p = 0; p < count; ++p) mine[p].round(panels, j, order, group_of.data());
    for (int64_t p = 0; p < count; ++p) mine[p].store(rows_of(p), codes + (begin + p) * width * k);
  });
}

}  // namespace awq
