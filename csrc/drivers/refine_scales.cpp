// With the levels a = code - zero of a group's channels and the errors e of the whole row, the group's best step is its
// own plus (e H a) / (a H a), two bilinear forms of one panel of H's columns. They are nearly all of the work, 2 K^2
// flops per row, and run in bf16 where the level has it. Levels are integers up to 255, which bf16 holds; H and the
// errors are rounded, H in the same way in both forms. The errors themselves are computed in fp32 after every step.
//
// What that costs: let u = 0.43 * 2^-8, the rms of what rounding to bf16 changes relatively, A(x) = sum of x_i^2 H_ii,
// d the damping and D = (1 + d) / d, so that A(x) is at most D times x H x^T. Rounding has random sign. The best step
// leaves errors e with e H a = 0. Rounding moves this zero of the derivative by at most sqrt(2) u sqrt(A(e) A(a)) rms
// through H (whose entries count twice within the group), and by at most u sqrt(A(e) a H a) through the errors. A step
// that is off by t loses t^2 a H a, so a group costs at most u^2 (2 D^2 + D) of the row's loss, 2.8e-5 at d = 1. Later
// groups respond with changes of random sign.
#include "drivers/refine.h"

#include <algorithm>
#include <vector>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/quadratic.h"
#include "drivers/refine_objective.h"
#include "drivers/row_tasks.h"

namespace awq {
namespace {

constexpr int64_t kPanelsPerTask = 18;       // a block of k of all these takes a third of a second-level cache of 1 MiB
constexpr int64_t kScratchBytes = 16 << 20;  // of a task
constexpr int64_t kBlockBytes = 1536;        // of a block of k in each row: so long that a tile's end costs little
constexpr double kLeastDamping = 0.1;        // for bf16: a group then costs at most 7e-4 of the loss; at 0.01, 6e-2
constexpr int64_t kStrip = 256;              // channels that are packed at a time

// For a few cache lines of each of many rows, far apart, which no processor prefetches by itself.
void prefetch(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i);
}

// H as panels as wide as a tile, all rows of each; 0 past the last channel.
class ColumnPanels {
 public:
  ColumnPanels(const KernelTable& table, Precision precision, const DampedMoment& h, int threads)
      : table_(table),
        precision_(precision),
        shape_(tile_shape(table, precision)),
        width_(shape_.cols),
        padded_(round_up(h.k, width_)),
        data_(padded_ * padded_ * value_bytes(precision)) {
    // By strips of rows, each of which is read as it lies in memory.
    parallel_for(padded_ / width_, threads, [&](int64_t strip, int) {
      for (int64_t j = 0; j < padded_ / width_; ++j) fill(h, strip * width_, j);
    });
  }

  int64_t padded_channels() const { return padded_; }
  Precision precision() const { return precision_; }
  const TileShape& shape() const { return shape_; }

  // out[m] += a[m] H[row : row + length, panel j] e[m]^T for one packed row panel a of these channels.
  void add_form(int64_t j, int64_t row, int64_t length, const char* a, const float* e, int64_t lde, double* out) const {
    awq::add_form(table_, precision_, a, data_.get() + offset(j, row), length, e, lde, out);
  }

 private:
  // Fills the square of panel j that begins at row `row`.
  void fill(const DampedMoment& h, int64_t row, int64_t j) {
    const int64_t first = j * width_, rows = std::min(width_, h.k - row), cols = std::min(width_, h.k - first);
    float square[kMaxTileCols * kMaxTileCols];
    if (rows < width_ || cols < width_) std::fill_n(square, width_ * width_, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
      if (first + width_ < h.k) prefetch(h.moment + (row + r) * h.k + first + width_, width_ * 4);  // of the next one
      h.row(row + r, first, cols, square + r * width_);
    }
    pack_column_square(table_, precision_, square, data_.get() + offset(j, row));
  }

  int64_t offset(int64_t j, int64_t row) const { return (j * padded_ + row) * width_ * value_bytes(precision_); }

  const KernelTable& table_;
  Precision precision_;
  TileShape shape_;
  int64_t width_;
  int64_t padded_;
  Buffer<char> data_;
};

// What is refined: see refine_scales.
struct Quantized {
  const WeightView& weight;
  const QuantSpec& spec;
  const float* channel_scale;
  const uint8_t* zeros;
  const uint8_t* codes;
  uint16_t* scales;
};

// Up to max_panels row panels (of as many weight rows as a tile has) whose scales are refined side by side, so that
// they share the parts of H that are read; with the scratch memory for that.
class RefinedScales {
 public:
  RefinedScales(const KernelTable& table, const ColumnPanels& h, const Quantized& q, int64_t max_panels)
      : table_(table),
        h_(h),
        q_(q),
        k_(q.weight.in_features),
        groups_(ceil_div(k_, q.spec.group_length)),
        bytes_(value_bytes(h.precision())),
        shape_(h.shape()),
        block_(on_tiles(h.precision() == Precision::bf16 ? table.bf16_products : nullptr) ? kTileBlockK
                                                                                          : kBlockBytes / bytes_),
        max_rows_(max_panels * shape_.rows),
        // One tile more because a group may begin and end within a panel of H, one as in MomentPanels::row_stride.
        stride_(round_up(q.spec.group_length, shape_.cols) + 2 * shape_.cols),
        steps_(max_rows_ * groups_),
        levels_(max_rows_ * stride_),
        strip_(shape_.rows * kStripStride),
        weights_(kStrip),
        errors_(max_rows_ * h.padded_channels() * bytes_),
        packed_levels_(max_rows_ * stride_ * bytes_),
        along_(max_rows_),
        size_(max_rows_) {}

  // Refines weight rows first .. first + rows.
  void refine(int64_t first, int64_t rows, int64_t rounds) {
    first_ = first;
    rows_ = rows;
    panels_ = ceil_div(rows, shape_.rows);
    const ProductTask product_task(table_, h_.precision());
    table_.to_float(q_.scales + first * groups_, q_.spec.scale_dtype, rows * groups_, steps_.get());
    pack_errors(0, h_.padded_channels());
    for (int64_t round = 0; round < rounds; ++round)
      for (int64_t g = 0; g < groups_; ++g) refine_group(g);
    table_.from_float(steps_.get(), q_.spec.scale_dtype, rows * groups_, q_.scales + first * groups_);
  }

 private:
  static constexpr int64_t kStripStride = kStrip + 16;  // not a power of two, as in MomentPanels::row_stride

  void refine_group(int64_t g) {
    const int64_t begin = g * q_.spec.group_length, end = std::min(k_, begin + q_.spec.group_length);
    const int64_t from = begin / align_ * align_, to = round_up(end, align_);
    const int64_t width = shape_.cols, first_panel = begin / width, panels = ceil_div(end, width) - first_panel;
    load_levels(g, begin, end, first_panel * width, panels * width);
    for (int64_t p = 0; p < panels_; ++p)
      pack_row_panel(table_, h_.precision(), panel_levels(p) + from - first_panel * width, stride_, to - from,
                     packed_levels_.get() + p * shape_.rows * (to - from) * bytes_);
    add_forms(errors_.get(), 0, h_.padded_channels(), first_panel, panels, along_.get());
    add_forms(packed_levels_.get(), from, to, first_panel, panels, size_.get());
    for (int64_t r = 0; r < rows_; ++r) {
      float& step = steps_.get()[r * groups_ + g];
      // NaN where size is 0
      step = moved_step(table_, q_.spec.scale_dtype, step, static_cast<float>(step + along_.get()[r] / size_.get()[r]));
    }
    pack_errors(from, to);
  }

  // Writes levels [rows][count] from channel `origin` on, 0 outside the group.
  void load_levels(int64_t g, int64_t begin, int64_t end, int64_t origin, int64_t count) {
    for (int64_t r = 0; r < panels_ * shape_.rows; ++r) {
      float* out = levels_.get() + r * stride_;
      std::fill_n(out, count, 0.0f);
      if (r >= rows_) continue;
      const int64_t n = first_ + r;
      prefetch_codes(r + shape_.rows, begin, end - begin);
      table_.dequantize_group(q_.codes + n * k_ + begin, end - begin, 1.0f, q_.zeros[n * groups_ + g],
                              out + begin - origin);
    }
  }

  float* panel_levels(int64_t p) { return levels_.get() + p * shape_.rows * stride_; }

  // out[r] = a_r H[from : to, panels of the group] level_r^T, a packed; in blocks of k of about equal length, in each
  // of which all row panels stream past one panel of H.
  void add_forms(const char* a, int64_t from, int64_t to, int64_t first_panel, int64_t panels, double* out) {
    const int64_t mr = shape_.rows, blocks = std::max<int64_t>(1, (to - from + block_ / 2) / block_);
    const int64_t block = round_up(ceil_div(to - from, blocks), align_);
    std::fill_n(out, panels_ * mr, 0.0);
    for (int64_t at = from; at < to; at += block)
      for (int64_t j = 0; j < panels; ++j)
        for (int64_t p = 0; p < panels_; ++p)
          h_.add_form(first_panel + j, at, std::min(block, to - at), a + (p * (to - from) + at - from) * mr * bytes_,
                      panel_levels(p) + j * shape_.cols, stride_, out + p * mr);
  }

  // Packs the errors of channels from .. to (both multiples of align_) under the current steps.
  void pack_errors(int64_t from, int64_t to) {
    const int64_t mr = shape_.rows;
    for (int64_t at = from; at < to; at += kStrip) {
      const int64_t count = std::min(kStrip, to - at);
      for (int64_t p = 0; p < panels_; ++p) {
        for (int64_t r = 0; r < mr; ++r) row_errors(p * mr + r, at, count, strip_.get() + r * kStripStride);
        pack_row_panel(table_, h_.precision(), strip_.get(), kStripStride, count,
                       errors_.get() + (p * h_.padded_channels() + at) * mr * bytes_);
      }
    }
  }

  void row_errors(int64_t r, int64_t from, int64_t count, float* out) {
    const int64_t n = first_ + r, there = r < rows_ ? std::clamp<int64_t>(k_ - from, 0, count) : 0;
    std::fill(out + there, out + count, 0.0f);
    if (there == 0) return;
    float* w = weights_.get();
    prefetch_codes(r + shape_.rows, from, there);
    prefetch_weights(r + shape_.rows, from, there);
    table_.to_float(q_.weight.at(n, from), q_.weight.dtype, there, w);
    if (q_.channel_scale != nullptr) table_.multiply(w, q_.channel_scale + from, there, w);
    const int64_t length = q_.spec.group_length, end = from + there;
    for (int64_t i = from; i < end;) {
      const int64_t g = i / length, next = std::min(end, (g + 1) * length);
      table_.dequantize_group(q_.codes + n * k_ + i, next - i, steps_.get()[r * groups_ + g], q_.zeros[n * groups_ + g],
                              out + i - from);
      i = next;
    }
    for (int64_t i = 0; i < there; ++i) out[i] = w[i] - out[i];
  }

  void prefetch_codes(int64_t r, int64_t from, int64_t count) const {
    if (r < rows_) prefetch(q_.codes + (first_ + r) * k_ + from, count);
  }
  void prefetch_weights(int64_t r, int64_t from, int64_t count) const {
    if (r < rows_) prefetch(q_.weight.at(first_ + r, from), count * dtype_bytes(q_.weight.dtype));
  }

  const KernelTable& table_;
  const ColumnPanels& h_;
  const Quantized& q_;
  int64_t k_;
  int64_t groups_;
  int64_t bytes_;
  TileShape shape_;
  int64_t block_;                                       // channels of a block of k, about
  int64_t align_ = std::max<int64_t>(2, shape_.depth);  // blocks of k begin at a multiple
  int64_t max_rows_;
  int64_t stride_;
  int64_t first_ = 0, rows_ = 0, panels_ = 0;
  Buffer<float> steps_, levels_, strip_, weights_;
  Buffer<char> errors_, packed_levels_;
  Buffer<double> along_, size_;
};

}  // namespace

void refine_scales(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                   const float* channel_scale, const float* moment, double damping, int64_t rounds,
                   const uint8_t* zeros, const uint8_t* codes, uint16_t* scales, int threads) {
  if (rounds == 0) return;
  const Precision precision = damping < kLeastDamping ? Precision::f32 : ranking_precision(table);
  const ColumnPanels h(table, precision, {moment, weight.in_features, channel_scale, damping}, threads);
  const Quantized quantized{weight, spec, channel_scale, zeros, codes, scales};
  const int64_t mr = h.shape().rows;
  // In RefinedScales: packed errors, and levels both packed and not.
  const int64_t panel_bytes = mr * (weight.in_features + 2 * spec.group_length) * int64_t{sizeof(float)};
  const int64_t most = std::clamp<int64_t>(kScratchBytes / panel_bytes, 1, kPanelsPerTask);
  for_row_tasks(
      weight.out_features, mr, most, threads,
      [&](int64_t panels) { return RefinedScales(table, h, quantized, panels); },
      [&](RefinedScales& rows, int64_t first, int64_t end) { rows.refine(first, end - first, rounds); });
}

}  // namespace awq
