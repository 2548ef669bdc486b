#include "drivers/refine.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/refine_objective.h"

namespace awq {
namespace {

// H as panels of tile_rows columns, all K rows of each.
class FullPanels {
 public:
  FullPanels(const KernelTable& table, const DampedMoment& h, int threads)
      : width_(table.tile_rows), k_(h.k), count_(ceil_div(k_, width_)), data_(count_ * width_ * k_) {
    parallel_for(count_, threads, [&](int64_t j, int) {
      float* out = data_.get() + j * width_ * k_;
      const int64_t first = j * width_, cols = std::min(width_, k_ - first);
      if (cols < width_) std::fill_n(out, k_ * width_, 0.0f);
      for (int64_t i = 0; i < k_; ++i) h.row(i, first, cols, out + i * width_);
    });
  }

  int64_t width() const { return width_; }
  int64_t count() const { return count_; }
  // Panel j from row `row` on.
  const float* at(int64_t j, int64_t row) const { return data_.get() + (j * k_ + row) * width_; }

 private:
  int64_t width_;
  int64_t k_;
  int64_t count_;
  Buffer<float> data_;
};

// tile_cols weight rows, channels outermost: [K][tile_cols] or [G][tile_cols].
class RefinedRows {
 public:
  RefinedRows(const KernelTable& table, const QuantSpec& spec, int64_t k)
      : table_(table),
        spec_(spec),
        k_(k),
        width_(table.tile_cols),
        groups_(ceil_div(k, spec.group_length)),
        weights_(k * width_),
        errors_(k * width_),
        levels_(k * width_),
        steps_(groups_ * width_),
        zeros_(groups_ * width_),
        codes_(k * width_),
        row_(k) {}

  void load(const WeightView& weight, int64_t first, int64_t count, const float* channel_scale, const uint8_t* zeros,
            const uint8_t* codes, const uint16_t* scales) {
    std::fill_n(weights_.get(), k_ * width_, 0.0f);  // missing rows: weights of 0 on a grid of step 1
    std::fill_n(codes_.get(), k_ * width_, uint8_t{0});
    std::fill_n(steps_.get(), groups_ * width_, 1.0f);
    std::fill_n(zeros_.get(), groups_ * width_, 0.0f);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t n = first + r;
      table_.to_float(weight.row(n), weight.dtype, k_, row_.get());
      if (channel_scale != nullptr) table_.multiply(row_.get(), channel_scale, k_, row_.get());
      for (int64_t i = 0; i < k_; ++i) weights_.get()[i * width_ + r] = row_.get()[i];
      for (int64_t i = 0; i < k_; ++i) codes_.get()[i * width_ + r] = codes[n * k_ + i];
      for (int64_t g = 0; g < groups_; ++g) {
        table_.to_float(scales + n * groups_ + g, spec_.scale_dtype, 1, steps_.get() + g * width_ + r);
        zeros_.get()[g * width_ + r] = zeros[n * groups_ + g];
      }
    }
    measure();
  }

  // Sets the step of group g to its best value while all else stays: with a = code - zero and e the errors, it grows by
  // (e H a) / (a H a).
  void refine_step(const FullPanels& h, int64_t g) {
    const int64_t begin = g * spec_.group_length, end = std::min(k_, begin + spec_.group_length), mr = h.width();
    double along[kMaxTileCols] = {}, size[kMaxTileCols] = {};
    for (int64_t j = begin / mr; j * mr < end; ++j) {
      float pull[kMaxTile] = {}, own[kMaxTile] = {};
      table_.gemm_tile(h.at(j, 0), errors_.get(), k_, pull, width_);
      table_.gemm_tile(h.at(j, begin), levels_.get() + begin * width_, end - begin, own, width_);
      for (int64_t i = std::max(begin, j * mr); i < std::min(end, (j + 1) * mr); ++i)
        for (int64_t r = 0; r < width_; ++r) {
          const float level = levels_.get()[i * width_ + r];
          along[r] += static_cast<double>(level) * pull[(i - j * mr) * width_ + r];
          size[r] += static_cast<double>(level) * own[(i - j * mr) * width_ + r];
        }
    }
    for (int64_t r = 0; r < width_; ++r) {
      float& step = steps_.get()[g * width_ + r];
      // NaN where size is 0
      step = moved_step(table_, spec_.scale_dtype, step, static_cast<float>(step + along[r] / size[r]));
    }
    measure(g);
  }

  // Sets the code of each channel of panel j in turn to its best value.
  void refine_codes(const FullPanels& h, int64_t j, const int64_t* order, const int64_t* group_of) {
    const int64_t mr = h.width(), begin = j * mr, end = std::min(k_, begin + mr);
    float sums[kMaxTile] = {};
    table_.gemm_tile(h.at(j, 0), errors_.get(), begin, sums, width_);
    table_.gemm_tile(h.at(j, end), errors_.get() + end * width_, k_ - end, sums, width_);
    const GptqPanel panel{static_cast<int>(end - begin),
                          h.at(j, begin),
                          weights_.get() + begin * width_,
                          steps_.get(),
                          zeros_.get(),
                          order + begin,
                          group_of + begin,
                          static_cast<float>((1 << spec_.bits) - 1),
                          true};
    table_.gptq_panel(&panel, sums, errors_.get() + begin * width_, codes_.get());
  }

  // Computes levels and errors from the current codes and steps, which the steps of the next round need.
  void measure() {
    for (int64_t g = 0; g < groups_; ++g) measure(g);
  }

  void store(int64_t first, int64_t count, uint8_t* codes, uint16_t* scales) const {
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < k_; ++i) codes[(first + r) * k_ + i] = codes_.get()[i * width_ + r];
      for (int64_t g = 0; g < groups_; ++g)
        table_.from_float(steps_.get() + g * width_ + r, spec_.scale_dtype, 1, scales + (first + r) * groups_ + g);
    }
  }

 private:
  void measure(int64_t g) {
    const int64_t begin = g * spec_.group_length, end = std::min(k_, begin + spec_.group_length);
    const float *steps = steps_.get() + g * width_, *zeros = zeros_.get() + g * width_;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t r = 0, at = i * width_; r < width_; ++r, ++at) {
        levels_.get()[at] = static_cast<float>(codes_.get()[at]) - zeros[r];
        errors_.get()[at] = weights_.get()[at] - levels_.get()[at] * steps[r];
      }
  }

  const KernelTable& table_;
  const QuantSpec& spec_;
  int64_t k_;
  int64_t width_;
  int64_t groups_;
  Buffer<float> weights_, errors_, levels_, steps_, zeros_;
  Buffer<uint8_t> codes_;
  Buffer<float> row_;
};

}  // namespace

void refine_quantized(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                      const float* channel_scale, const float* moment, double damping, int64_t rounds,
                      const uint8_t* zeros, uint8_t* codes, uint16_t* scales, int threads) {
  constexpr int64_t kErrorFloats = 1 << 18;  // errors of a task: with a panel of H in the second-level cache
  const int64_t k = weight.in_features, n = weight.out_features, width = table.tile_cols;
  std::vector<int64_t> order(static_cast<size_t>(k)), group_of(static_cast<size_t>(k));
  std::iota(order.begin(), order.end(), int64_t{0});
  for (int64_t i = 0; i < k; ++i) group_of[static_cast<size_t>(i)] = i / spec.group_length;
  const FullPanels h(table, {moment, k, channel_scale, damping}, threads);
  const int64_t total = ceil_div(n, width), groups = ceil_div(k, spec.group_length);
  const int64_t share = std::clamp<int64_t>(kErrorFloats / (k * width), 1, ceil_div(total, int64_t{4} * threads));
  std::vector<RefinedRows> rows;
  for (int64_t i = 0; i < threads * share; ++i) rows.emplace_back(table, spec, k);
  parallel_for(ceil_div(total, share), threads, [&](int64_t task, int thread) {
    RefinedRows* mine = rows.data() + thread * share;
    const int64_t begin = task * share, count = std::min(share, total - begin);
    const auto rows_of = [&](int64_t p) { return std::min(width, n - (begin + p) * width); };
    for (int64_t p = 0; p < count; ++p)
      mine[p].load(weight, (begin + p) * width, rows_of(p), channel_scale, zeros, codes, scales);
    for (int64_t round = 0; round < rounds; ++round) {
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t p = 0; p < count; ++p) mine[p].refine_step(h, g);
      for (int64_t j = 0; j < h.count(); ++j)
        for (int64_t p = 0; p < count; ++p) mine[p].refine_codes(h, j, order.data(), group_of.data());
      for (int64_t p = 0; p < count; ++p) mine[p].measure();
    }
    for (int64_t p = 0; p < count; ++p) mine[p].store((begin + p) * width, rows_of(p), codes, scales);
  });
}

}  // namespace awq
