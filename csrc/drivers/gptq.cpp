#include "drivers/gptq.h"

#include <algorithm>
#include <vector>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/gptq_rows.h"
#include "drivers/products.h"

namespace awq {
namespace {

// The factor as panels of tile_rows columns, each down to the end of its diagonal block.
class FactorPanels {
 public:
  explicit FactorPanels(const GptqCall& call)
      : width_(call.table.tile_rows),
        count_(ceil_div(call.channels(), width_)),
        data_(count_ * (count_ + 1) / 2 * width_ * width_) {
    const int64_t k = call.channels();
    parallel_for(count_, call.threads, [&](int64_t task, int) {
      const int64_t j = count_ - 1 - task, rows = std::min(k, (j + 1) * width_);
      float* panel = data_.get() + offset(j);
      call.table.pack_columns(call.factor + j * width_, k, rows, std::min(width_, k - j * width_), width_, panel);
      if (call.channel_scale == nullptr) return;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < width_; ++c) panel[i * width_ + c] /= call.channel_scale[call.order[i]];
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

// A panel of tile_cols weight rows with their errors, [K][tile_cols].
struct RowErrors {
  const GptqCall& call;
  RowPanel rows;
  Buffer<float> errors;

  explicit RowErrors(const GptqCall& c)
      : call(c), rows(c, c.table.tile_cols), errors(c.channels() * c.table.tile_cols) {}

  // Rounds the channels of factor panel j; those of the panels before it are done.
  void round(const FactorPanels& factor, int64_t j) {
    const KernelTable& table = call.table;
    const int64_t width = table.tile_cols, mr = table.tile_rows, begin = j * mr;
    float sums[kMaxTile] = {};
    table.gemm_tile(factor.above(j), errors.get(), begin, sums, width);
    const GptqPanel panel = rows.panel(begin, std::min(mr, call.channels() - begin), factor.diagonal(j));
    table.gptq_panel(&panel, sums, errors.get() + begin * width, rows.codes());
  }
};

void gptq_in_vectors(const GptqCall& call) {
  constexpr int64_t kErrorFloats = 1 << 18;  // errors of a task: with a panel of the factor in the second-level cache
  const int64_t k = call.channels(), n = call.weight.out_features, width = call.table.tile_cols;
  const FactorPanels panels(call);
  // Row panels of a task share each factor panel, but every thread should have several tasks.
  const int64_t total = ceil_div(n, width);
  const int64_t share = std::clamp<int64_t>(kErrorFloats / (k * width), 1, ceil_div(total, int64_t{4} * call.threads));
  std::vector<RowErrors> rows;
  for (int64_t i = 0; i < call.threads * share; ++i) rows.emplace_back(call);
  parallel_for(ceil_div(total, share), call.threads, [&](int64_t task, int thread) {
    RowErrors* mine = rows.data() + thread * share;
    const int64_t begin = task * share, count = std::min(share, total - begin);
    const auto rows_of = [&](int64_t p) { return std::min(width, n - (begin + p) * width); };
    for (int64_t p = 0; p < count; ++p) mine[p].rows.load((begin + p) * width, rows_of(p));
    for (int64_t j = 0; j < panels.count(); ++j)
      for (int64_t p = 0; p < count; ++p) mine[p].round(panels, j);
    for (int64_t p = 0; p < count; ++p) mine[p].rows.store((begin + p) * width, rows_of(p));
  });
}

}  // namespace

void gptq_quantize(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                   const float* channel_scale, const float* clip, const float* factor, const int64_t* order,
                   uint8_t* codes, uint16_t* scales, uint8_t* zeros, int threads) {
  GptqCall call{table, weight, spec, channel_scale, clip, factor, order, codes, scales, zeros, threads};
  for (int64_t i = 0; i < call.channels(); ++i) call.group_of.push_back(order[i] / spec.group_length);
  call.position.resize(call.group_of.size());
  for (int64_t i = 0; i < call.channels(); ++i) call.position[static_cast<size_t>(order[i])] = i;
  if (on_tiles(table.bf16_products))
    gptq_on_tiles(call);
  else
    gptq_in_vectors(call);
}

}  // namespace awq
