// What refine.cpp and refine_tiles.cpp share: the call, and weight rows while their scales and codes move.
#pragma once

#include <algorithm>
#include <vector>

#include "base/buffer.h"
#include "base/layout.h"
#include "drivers/quantize.h"
#include "drivers/refine_objective.h"

namespace awq {

// A call of refine_quantized.
struct RefineCall {
  const KernelTable& table;
  const WeightView& weight;
  const QuantSpec& spec;
  DampedMoment h;
  int64_t rounds;
  const uint8_t* zeros;
  uint8_t* codes;
  uint16_t* scales;
  int threads;
  std::vector<int64_t> order = {}, group_of = {};  // of each channel: its number, its group

  int64_t channels() const { return weight.in_features; }
  int64_t groups() const { return ceil_div(channels(), spec.group_length); }
  int64_t begin(int64_t group) const { return group * spec.group_length; }
  int64_t end(int64_t group) const { return std::min(channels(), (group + 1) * spec.group_length); }
};

// Refines all rows by products on tile registers (feedback.h).
void refine_on_tiles(const RefineCall& call);

// The two bilinear forms of a group that decide on its step, for each weight row.
struct StepForms {
  double along[kMaxTileCols] = {};  // e H a, a = code - zero in the group and 0 elsewhere
  double size[kMaxTileCols] = {};   // a H a
};

// `width` weight rows, channels outermost: [K][width] or [G][width].
class RefinedRows {
 public:
  RefinedRows(const RefineCall& call, int64_t width)
      : call_(call),
        width_(width),
        weights_(call.channels() * width),
        errors_(call.channels() * width),
        levels_(call.channels() * width),
        steps_(call.groups() * width),
        zeros_(call.groups() * width),
        codes_(call.channels() * width),
        row_(call.channels()) {}

  void load(int64_t first, int64_t count) {
    const int64_t k = call_.channels(), groups = call_.groups();
    std::fill_n(weights_.get(), k * width_, 0.0f);  // missing rows: weights of 0 on a grid of step 1
    std::fill_n(codes_.get(), k * width_, uint8_t{0});
    std::fill_n(steps_.get(), groups * width_, 1.0f);
    std::fill_n(zeros_.get(), groups * width_, 0.0f);
    const float* channel_scale = call_.h.channel_scale;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t n = first + r;
      call_.table.to_float(call_.weight.row(n), call_.weight.dtype, k, row_.get());
      if (channel_scale != nullptr) call_.table.multiply(row_.get(), channel_scale, k, row_.get());
      for (int64_t i = 0; i < k; ++i) weights_.get()[i * width_ + r] = row_.get()[i];
      for (int64_t i = 0; i < k; ++i) codes_.get()[i * width_ + r] = call_.codes[n * k + i];
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = n * groups + g;
        call_.table.to_float(call_.scales + at, call_.spec.scale_dtype, 1, steps_.get() + g * width_ + r);
        zeros_.get()[g * width_ + r] = call_.zeros[at];
      }
    }
    measure();
  }

  // Adds what channels begin .. end of a group give. pull: their columns of H times all errors; own: times the group's
  // levels; [channels][width].
  void add_forms(int64_t begin, int64_t end, const float* pull, const float* own, StepForms& forms) const {
    for (int64_t i = begin; i < end; ++i, pull += width_, own += width_)
      for (int64_t r = 0; r < width_; ++r) {
        const double level = levels_.get()[i * width_ + r];
        forms.along[r] += level * pull[r];
        forms.size[r] += level * own[r];
      }
  }

  // Sets the step of group g to its best value while all else stays: it grows by (e H a) / (a H a).
  void move_steps(int64_t g, const StepForms& forms) {
    for (int64_t r = 0; r < width_; ++r) {
      float& step = steps_.get()[g * width_ + r];
      // NaN where size is 0
      const float best = static_cast<float>(step + forms.along[r] / forms.size[r]);
      step = moved_step(call_.table, call_.spec.scale_dtype, step, best);
    }
    measure(g);
  }

  // Channels begin .. begin + count, whose block on the diagonal of H is given.
  GptqPanel panel(int64_t begin, int64_t count, const float* diagonal) const {
    return {static_cast<int>(count),
            diagonal,
            weights_.get() + begin * width_,
            steps_.get(),
            zeros_.get(),
            call_.order.data() + begin,
            call_.group_of.data() + begin,
            static_cast<float>((1 << call_.spec.bits) - 1),
            true};
  }
  uint8_t* codes() { return codes_.get(); }
  float* errors(int64_t channel) { return errors_.get() + channel * width_; }
  const float* levels(int64_t channel) const { return levels_.get() + channel * width_; }

  // Computes levels and errors from the current codes and steps, which the steps of the next round need.
  void measure() {
    for (int64_t g = 0; g < call_.groups(); ++g) measure(g);
  }

  void store(int64_t first, int64_t count) const {
    const int64_t k = call_.channels(), groups = call_.groups();
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < k; ++i) call_.codes[(first + r) * k + i] = codes_.get()[i * width_ + r];
      for (int64_t g = 0; g < groups; ++g)
        call_.table.from_float(steps_.get() + g * width_ + r, call_.spec.scale_dtype, 1,
                               call_.scales + (first + r) * groups + g);
    }
  }

 private:
  void measure(int64_t g) {
    const float *steps = steps_.get() + g * width_, *zeros = zeros_.get() + g * width_;
    for (int64_t i = call_.begin(g); i < call_.end(g); ++i)
      for (int64_t r = 0, at = i * width_; r < width_; ++r, ++at) {
        levels_.get()[at] = static_cast<float>(codes_.get()[at]) - zeros[r];
        errors_.get()[at] = weights_.get()[at] - levels_.get()[at] * steps[r];
      }
  }

  const RefineCall& call_;
  int64_t width_;
  Buffer<float> weights_, errors_, levels_, steps_, zeros_;
  Buffer<uint8_t> codes_;
  Buffer<float> row_;
};

}  // namespace awq
