#include "drivers/refine.h"

#include <algorithm>
#include <vector>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/products.h"
#include "drivers/refine_objective.h"
#include "drivers/refine_rows.h"

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

// The step of group g and the codes of panel j, see RefinedRows.
void refine_step(const RefineCall& call, const FullPanels& h, int64_t g, RefinedRows& rows) {
  const int64_t width = call.table.tile_cols, mr = h.width(), begin = call.begin(g), end = call.end(g);
  StepForms forms;
  for (int64_t j = begin / mr; j * mr < end; ++j) {
    float pull[kMaxTile] = {}, own[kMaxTile] = {};
    call.table.gemm_tile(h.at(j, 0), rows.errors(0), call.channels(), pull, width);
    call.table.gemm_tile(h.at(j, begin), rows.levels(begin), end - begin, own, width);
    const int64_t from = std::max(begin, j * mr), at = (from - j * mr) * width;
    rows.add_forms(from, std::min(end, (j + 1) * mr), pull + at, own + at, forms);
  }
  rows.move_steps(g, forms);
}

// Each channel in turn gets its best code.
void refine_codes(const RefineCall& call, const FullPanels& h, int64_t j, RefinedRows& rows) {
  const int64_t k = call.channels(), width = call.table.tile_cols, begin = j * h.width();
  const int64_t end = std::min(k, begin + h.width());
  float sums[kMaxTile] = {};
  call.table.gemm_tile(h.at(j, 0), rows.errors(0), begin, sums, width);
  call.table.gemm_tile(h.at(j, end), rows.errors(end), k - end, sums, width);
  const GptqPanel panel = rows.panel(begin, end - begin, h.at(j, begin));
  call.table.gptq_panel(&panel, sums, rows.errors(begin), rows.codes());
}

void refine_in_vectors(const RefineCall& call) {
  constexpr int64_t kErrorFloats = 1 << 18;  // errors of a task: with a panel of H in the second-level cache
  const int64_t k = call.channels(), n = call.weight.out_features, width = call.table.tile_cols;
  const FullPanels h(call.table, call.h, call.threads);
  const int64_t total = ceil_div(n, width);
  const int64_t share = std::clamp<int64_t>(kErrorFloats / (k * width), 1, ceil_div(total, int64_t{4} * call.threads));
  std::vector<RefinedRows> rows;
  for (int64_t i = 0; i < call.threads * share; ++i) rows.emplace_back(call, width);
  parallel_for(ceil_div(total, share), call.threads, [&](int64_t task, int thread) {
    RefinedRows* mine = rows.data() + thread * share;
    const int64_t begin = task * share, count = std::min(share, total - begin);
    const auto rows_of = [&](int64_t p) { return std::min(width, n - (begin + p) * width); };
    for (int64_t p = 0; p < count; ++p) mine[p].load((begin + p) * width, rows_of(p));
    for (int64_t round = 0; round < call.rounds; ++round) {
      for (int64_t g = 0; g < call.groups(); ++g)
        for (int64_t p = 0; p < count; ++p) refine_step(call, h, g, mine[p]);
      for (int64_t j = 0; j < h.count(); ++j)
        for (int64_t p = 0; p < count; ++p) refine_codes(call, h, j, mine[p]);
      for (int64_t p = 0; p < count; ++p) mine[p].measure();
    }
    for (int64_t p = 0; p < count; ++p) mine[p].store((begin + p) * width, rows_of(p));
  });
}

}  // namespace

void refine_quantized(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                      const float* channel_scale, const float* moment, double damping, int64_t rounds,
                      const uint8_t* zeros, uint8_t* codes, uint16_t* scales, int threads) {
  const int64_t k = weight.in_features;
  RefineCall call{table, weight, spec, {moment, k, channel_scale, damping}, rounds, zeros, codes, scales, threads};
  for (int64_t i = 0; i < k; ++i) {
    call.order.push_back(i);
    call.group_of.push_back(i / spec.group_length);
  }
  if (on_tiles(table.bf16_products))
    refine_on_tiles(call);
  else
    refine_in_vectors(call);
}

}  // namespace awq
