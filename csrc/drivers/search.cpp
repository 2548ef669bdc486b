#include "drivers/search.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"

namespace awq {
namespace {

MomentPanels pack_moment(const KernelTable& table, Precision precision, const float* moment, int64_t k, int threads) {
  MomentPanels panels(table, precision, k);
  // From the longest panel down, so that the last tasks are short.
  parallel_for(panels.count(), threads, [&](int64_t task, int) { panels.fill(panels.count() - 1 - task, moment, k); });
  return panels;
}

// The error of one row rounded group by group. scaled = w * channel_scale (or w itself).
void row_error(const KernelTable& table, const QuantSpec& spec, int64_t k, const float* scaled, const float* w,
               const float* channel_scale, float* error) {
  for (int64_t begin = 0; begin < k; begin += spec.group_length) {
    const int64_t length = std::min(spec.group_length, k - begin);
    const Grid grid = make_grid(table, table.group_range(scaled + begin, length), 1.0f, spec);
    table.group_error(scaled + begin, w + begin, channel_scale + begin, length, &grid, error + begin);
  }
}

// The errors of a quantized weight, a row at a time.
class CodeErrors {
 public:
  CodeErrors(const KernelTable& table, const WeightView& weight, const CodesView& codes, const float* channel_scale,
             const float* divisor, int threads)
      : table_(table),
        weight_(weight),
        codes_(codes),
        channel_scale_(channel_scale),
        divisor_(divisor),
        k_(weight.in_features),
        groups_(ceil_div(k_, codes.group_length)),
        weights_(threads * k_),
        steps_(threads * groups_),
        unpacked_(codes.packed ? threads * k_ : 0) {}

  // [K], of row n: value / channel_scale * divisor - weight, each rounded to fp32.
  void row(int64_t n, float* error, int thread) {
    dequantize(n, error, thread);
    if (channel_scale_ != nullptr)
      for (int64_t i = 0; i < k_; ++i) error[i] /= channel_scale_[i];
    if (divisor_ != nullptr)
      for (int64_t i = 0; i < k_; ++i) error[i] *= divisor_[n];
    float* w = weights_.get() + thread * k_;
    table_.to_float(weight_.row(n), weight_.dtype, k_, w);
    for (int64_t i = 0; i < k_; ++i) error[i] -= w[i];
  }

 private:
  void dequantize(int64_t n, float* out, int thread) {
    const uint8_t* codes = codes_.codes + n * (codes_.packed ? packed_bytes(k_) : k_);
    if (codes_.packed) {
      uint8_t* unpacked = unpacked_.get() + thread * k_;
      table_.unpack_int4(codes, k_, unpacked);
      codes = unpacked;
    }
    float* steps = steps_.get() + thread * groups_;
    const char* scales = static_cast<const char*>(codes_.scales) + n * groups_ * dtype_bytes(codes_.scale_dtype);
    table_.to_float(scales, codes_.scale_dtype, groups_, steps);
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t begin = g * codes_.group_length, length = std::min(codes_.group_length, k_ - begin);
      table_.dequantize_group(codes + begin, length, steps[g], static_cast<float>(codes_.zeros[n * groups_ + g]),
                              out + begin);
    }
  }

  const KernelTable& table_;
  const WeightView& weight_;
  const CodesView& codes_;
  const float* channel_scale_;
  const float* divisor_;
  int64_t k_;
  int64_t groups_;
  Buffer<float> weights_, steps_;  // of each thread
  Buffer<uint8_t> unpacked_;
};

// Sum of e_i^2 G_ii, in fp64.
double own_loss(const float* error, const float* diagonal, int64_t k) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < k; ++i) sum += static_cast<double>(error[i]) * error[i] * diagonal[i];
  return sum;
}

// One group of many rows under every ratio: a task of search_clip, with the scratch memory it needs.
class ClipTask {
 public:
  ClipTask(const KernelTable& table, Precision precision, const QuantSpec& spec, int64_t max_panels)
      : table_(table),
        precision_(precision),
        spec_(spec),
        panel_rows_(tile_shape(table, precision).rows),
        max_rows_(max_panels * panel_rows_),
        stride_(round_up(spec.group_length, tile_shape(table, precision).cols) + tile_shape(table, precision).cols),
        weights_(max_rows_ * stride_),
        scaled_(max_rows_ * stride_),
        errors_(max_rows_ * stride_),
        panels_(max_rows_ * stride_ * value_bytes(precision)),
        ranges_(max_rows_),
        losses_(max_rows_),
        best_(max_rows_) {}

  // Rows first .. first + count of the weight, channels begin .. begin + g.channels(); chosen has row stride `groups`.
  void run(const MomentPanels& g, const WeightView& weight, int64_t first, int64_t count, int64_t begin,
           const float* channel_scale, const float* ratios, int64_t ratio_count, float* chosen, int64_t groups) {
    const int64_t length = g.channels(), stride = g.row_stride(), panels = ceil_div(count, panel_rows_);
    const ProductTask product_task(table_, precision_);
    load(weight, first, count, begin, length, stride, channel_scale);
    std::fill_n(errors_.get(), panels * panel_rows_ * stride, 0.0f);  // the padding stays 0
    std::fill_n(best_.get(), count, std::numeric_limits<double>::infinity());
    for (int64_t r = 0; r < count; ++r) chosen[r * groups] = 1.0f;
    for (int64_t i = 0; i < ratio_count; ++i) {
      measure(g, count, panels, ratios[i], channel_scale);
      for (int64_t r = 0; r < count; ++r) {
        if (!(losses_.get()[r] < best_.get()[r])) continue;
        best_.get()[r] = losses_.get()[r];
        chosen[r * groups] = ratios[i];
      }
    }
  }

 private:
  void load(const WeightView& weight, int64_t first, int64_t count, int64_t begin, int64_t length, int64_t stride,
            const float* channel_scale) {
    for (int64_t r = 0; r < count; ++r) {
      float* w = weights_.get() + r * stride;
      float* scaled = scaled_.get() + r * stride;
      table_.to_float(weight.at(first + r, begin), weight.dtype, length, w);
      if (channel_scale != nullptr)
        table_.multiply(w, channel_scale, length, scaled);
      else
        std::copy_n(w, length, scaled);
      ranges_.get()[r] = table_.group_range(scaled, length);
    }
  }

  void measure(const MomentPanels& g, int64_t count, int64_t panels, float ratio, const float* channel_scale) {
    const int64_t stride = g.row_stride(), mr = panel_rows_;
    for (int64_t r = 0; r < count; ++r) {
      const Grid grid = make_grid(table_, ranges_.get()[r], ratio, spec_);
      table_.group_error(scaled_.get() + r * stride, weights_.get() + r * stride, channel_scale, g.channels(), &grid,
                         errors_.get() + r * stride);
    }
    for (int64_t p = 0; p < panels; ++p)
      pack_row_panel(g, errors_.get() + p * mr * stride, panels_.get() + p * row_panel_bytes(g));
    std::fill_n(losses_.get(), panels * mr, 0.0);
    for (int64_t block = 0; block < g.block_count(); ++block)
      g.add_block(block, panels_.get(), errors_.get(), panels, losses_.get());
  }

  const KernelTable& table_;
  Precision precision_;
  const QuantSpec& spec_;
  int64_t panel_rows_;
  int64_t max_rows_;
  int64_t stride_;  // of the longest group
  Buffer<float> weights_, scaled_, errors_;
  Buffer<char> panels_;
  Buffer<Range> ranges_;
  Buffer<double> losses_, best_;
};

}  // namespace

void quadratic_loss(const KernelTable& table, const float* error, int64_t rows, int64_t in_features,
                    const float* moment, double* losses, int threads) {
  const MomentPanels g = pack_moment(table, loss_precision(table, in_features), moment, in_features, threads);
  const auto make_row = [&](int64_t r, float* row, int) {
    std::copy_n(error + r * in_features, in_features, row);
    std::fill_n(row + in_features, g.row_stride() - in_features, 0.0f);
  };
  quadratic_losses(g, rows, threads, make_row, losses);
}

void code_losses(const KernelTable& table, const WeightView& weight, const CodesView& codes, const float* channel_scale,
                 const float* divisor, const float* moment, double damping, bool ranking, double* plain, double* damped,
                 int threads) {
  const int64_t k = weight.in_features;
  const Precision precision = ranking ? ranking_precision(table) : loss_precision(table, k);
  const MomentPanels g = pack_moment(table, precision, moment, k, threads);
  CodeErrors errors(table, weight, codes, channel_scale, divisor, threads);
  Buffer<float> diagonal(k);
  for (int64_t i = 0; i < k; ++i) diagonal.get()[i] = moment[i * k + i];
  const auto make_row = [&](int64_t n, float* row, int thread) {
    errors.row(n, row, thread);
    if (damped != nullptr) damped[n] = damping * own_loss(row, diagonal.get(), k);
    std::fill_n(row + k, g.row_stride() - k, 0.0f);
  };
  quadratic_losses(g, weight.out_features, threads, make_row, plain);
  for (int64_t n = 0; n < weight.out_features; ++n) {
    // a rounding error, where nothing is lost or inputs hardly vary
    if (plain[n] < 0.0) plain[n] = 0.0;
    if (damped != nullptr) damped[n] += plain[n];
  }
}

void scale_losses(const KernelTable& table, const WeightView& weight, const QuantSpec& spec, const float* candidates,
                  int64_t count, const float* moment, int64_t max_rows, double* losses, int threads) {
  const int64_t k = weight.in_features;
  const bool sampled = 0 < max_rows && max_rows < weight.out_features;
  const int64_t rows = sampled ? max_rows : weight.out_features;
  const Precision precision = sampled ? ranking_precision(table) : loss_precision(table, k);
  const MomentPanels g = pack_moment(table, precision, moment, k, threads);
  Buffer<float> scratch(threads * 2 * k);
  // Candidates and rows as one long list: enough to keep any number of threads busy.
  std::vector<double> row_losses(static_cast<size_t>(count * rows));
  const auto make_row = [&](int64_t index, float* error, int thread) {
    const float* s = candidates + index / rows * k;
    const int64_t n = sampled ? index % rows * weight.out_features / rows : index % rows;
    float* w = scratch.get() + thread * 2 * k;
    float* scaled = w + k;
    table.to_float(weight.row(n), weight.dtype, k, w);
    table.multiply(w, s, k, scaled);
    row_error(table, spec, k, scaled, w, s, error);
    std::fill_n(error + k, g.row_stride() - k, 0.0f);
  };
  quadratic_losses(g, count * rows, threads, make_row, row_losses.data());
  for (int64_t c = 0; c < count; ++c) {
    losses[c] = 0.0;
    for (int64_t r = 0; r < rows; ++r) losses[c] += row_losses[static_cast<size_t>(c * rows + r)];
  }
}

void search_clip(const KernelTable& table, const WeightView& weight, const QuantSpec& spec, const float* channel_scale,
                 const float* moment, const float* ratios, int64_t ratio_count, float* chosen, int threads) {
  constexpr int64_t kScratchFloats = 1 << 15;  // rows x channels of a task: its four buffers share a second-level cache
  const Precision precision = ranking_precision(table);
  const int64_t k = weight.in_features, g = spec.group_length, groups = ceil_div(k, g);
  const int64_t mr = tile_shape(table, precision).rows;
  const int64_t panels = std::clamp<int64_t>(kScratchFloats / (g * mr), 1, ceil_div(weight.out_features, mr));
  std::vector<MomentPanels> moments;
  for (int64_t i = 0; i < groups; ++i) moments.emplace_back(table, precision, std::min(g, k - i * g));
  parallel_for(groups, threads, [&](int64_t i, int) {
    MomentPanels& block = moments[static_cast<size_t>(i)];
    for (int64_t j = 0; j < block.count(); ++j) block.fill(j, moment + i * g * (k + 1), k);
  });
  std::vector<ClipTask> tasks;
  for (int t = 0; t < threads; ++t) tasks.emplace_back(table, precision, spec, panels);
  const int64_t bundle = panels * mr, bundles = ceil_div(weight.out_features, bundle);
  parallel_for(groups * bundles, threads, [&](int64_t task, int thread) {
    const int64_t i = task / bundles, first = task % bundles * bundle;
    const int64_t count = std::min(bundle, weight.out_features - first);
    tasks[static_cast<size_t>(thread)].run(moments[static_cast<size_t>(i)], weight, first, count, i * g,
                                           channel_scale == nullptr ? nullptr : channel_scale + i * g, ratios,
                                           ratio_count, chosen + first * groups + i, groups);
  });
}

}  // namespace awq
