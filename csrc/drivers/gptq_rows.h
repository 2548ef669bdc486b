// What gptq.cpp and gptq_tiles.cpp share: the call, and weight rows while they are rounded.
#pragma once

#include <algorithm>
#include <vector>

#include "base/buffer.h"
#include "base/layout.h"
#include "drivers/quantize.h"
#include "kernels/kernels.h"

namespace awq {

// A call of gptq_quantize.
struct GptqCall {
  const KernelTable& table;
  const WeightView& weight;
  const QuantSpec& spec;
  const float* channel_scale;
  const float* clip;
  const float* factor;
  const int64_t* order;
  uint8_t* codes;
  uint16_t* scales;
  uint8_t* zeros;
  int threads;
  std::vector<int64_t> position = {}, group_of = {};  // of a channel in the order; of a place in it

  int64_t channels() const { return weight.in_features; }
  int64_t groups() const { return ceil_div(channels(), spec.group_length); }
};

// Rounds all rows by products on tile registers (feedback.h).
void gptq_on_tiles(const GptqCall& call);

// Buffers of a panel of `width` weight rows, channels outermost: [K][width] unless said otherwise.
class RowPanel {
 public:
  RowPanel(const GptqCall& call, int64_t width)
      : call_(call),
        width_(width),
        weights_(call.channels() * width),
        steps_(call.groups() * width),
        zeros_(call.groups() * width),
        codes_(call.channels() * width),
        row_(call.channels()) {}

  // Loads rows first .. first + count of the weight, scaled, and their grids, which also go to scales and zeros [N, G].
  void load(int64_t first, int64_t count) {
    const int64_t width = width_, k = call_.channels(), groups = call_.groups(), length = call_.spec.group_length;
    if (count < width) {  // missing rows: weights of 0 on a grid of step 1
      std::fill_n(weights_.get(), k * width, 0.0f);
      std::fill_n(steps_.get(), groups * width, 1.0f);
      std::fill_n(zeros_.get(), groups * width, 0.0f);
    }
    float* row = row_.get();
    const int64_t* position = call_.position.data();
    for (int64_t r = 0; r < count; ++r) {
      call_.table.to_float(call_.weight.row(first + r), call_.weight.dtype, k, row);
      if (call_.channel_scale != nullptr) call_.table.multiply(row, call_.channel_scale, k, row);
      for (int64_t i = 0; i < k; ++i) weights_.get()[position[i] * width + r] = row[i];
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * length, at = (first + r) * groups + g;
        const Range range = call_.table.group_range(row + begin, std::min(length, k - begin));
        const Grid grid = make_grid(call_.table, range, call_.clip == nullptr ? 1.0f : call_.clip[at], call_.spec);
        steps_.get()[g * width + r] = grid.step;
        zeros_.get()[g * width + r] = grid.zero;
        call_.scales[at] = grid.scale_bits;
        call_.zeros[at] = static_cast<uint8_t>(grid.zero);
      }
    }
  }

  // Channels begin .. begin + count of the order, whose block on the diagonal of the factor is given.
  GptqPanel panel(int64_t begin, int64_t count, const float* diagonal) const {
    return {static_cast<int>(count),
            diagonal,
            weights_.get() + begin * width_,
            steps_.get(),
            zeros_.get(),
            call_.order + begin,
            call_.group_of.data() + begin,
            static_cast<float>((1 << call_.spec.bits) - 1),
            false};
  }
  uint8_t* codes() { return codes_.get(); }  // by original channel

  // To the rows of the call from `first` on.
  void store(int64_t first, int64_t count) const {
    constexpr int64_t kStrip = 64;  // a cache line of each row at a time
    const int64_t width = width_, k = call_.channels();
    uint8_t* codes = call_.codes + first * k;
    for (int64_t begin = 0; begin < k; begin += kStrip)
      for (int64_t r = 0; r < count; ++r)
        for (int64_t i = begin; i < std::min(k, begin + kStrip); ++i) codes[r * k + i] = codes_.get()[i * width + r];
  }

 private:
  const GptqCall& call_;
  int64_t width_;
  Buffer<float> weights_, steps_, zeros_;
  Buffer<uint8_t> codes_;
  Buffer<float> row_;
};

}  // namespace awq
