#include <algorithm>
#include <vector>

#include "drivers/feedback.h"
#include "drivers/gptq_rows.h"
#include "drivers/row_tasks.h"

namespace awq {
namespace {

// The factor's squares: see FeedbackMatrix.
void fill_factor(const GptqCall& call, int64_t side, int64_t row, int64_t column, float* square) {
  const int64_t k = call.channels(), rows = std::min(side, k - row), columns = std::min(side, k - column);
  if (rows < side || columns < side) std::fill_n(square, side * side, 0.0f);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < columns; ++c) {
      const float value = call.factor[(row + i) * k + column + c];
      square[i * side + c] = call.channel_scale == nullptr ? value : value / call.channel_scale[call.order[row + i]];
    }
}

// Weight rows of a task: up to `most` panels side by side.
class TaskRows {
 public:
  TaskRows(const GptqCall& call, const FeedbackMatrix& factor, const FeedbackTerms& terms, int64_t most)
      : call_(call), factor_(factor) {
    for (int64_t p = 0; p < most; ++p) {
      rows_.emplace_back(call, factor.side());
      errors_.emplace_back(factor.products(), terms, call.channels());
    }
  }

  // Rounds weight rows first .. end.
  void round(int64_t first, int64_t end) {
    const ProductTask product_task(&factor_.products());
    const int64_t side = factor_.side();
    count_ = ceil_div(end - first, side);
    const auto row = [&](int64_t p) { return first + p * side; };
    for (int64_t p = 0; p < count_; ++p) rows_[at(p)].load(row(p), std::min(side, end - row(p)));
    for (int64_t panel = 0; panel < factor_.count(); panel += kSpanPanels)
      round_span(panel, std::min(factor_.count(), panel + kSpanPanels));
    for (int64_t p = 0; p < count_; ++p) rows_[at(p)].store(row(p), std::min(side, end - row(p)));
  }

 private:
  static size_t at(int64_t p) { return static_cast<size_t>(p); }

  // Rounds panels first .. last; those before are done.
  void round_span(int64_t first, int64_t last) {
    for (int64_t p = 0; p < count_; ++p) errors_[at(p)].clear_sums();
    add_feedback(factor_, errors_.data(), count_, first, last, {0, first * factor_.side()});
    for (int64_t j = first; j < last; ++j)
      for (int64_t p = 0; p < count_; ++p) round_panel(p, first, j);
  }

  void round_panel(int64_t p, int64_t first, int64_t j) {
    const int64_t side = factor_.side(), begin = j * side, channels = std::min(side, call_.channels() - begin);
    float* sums = errors_[at(p)].sums(j - first);
    add_feedback(factor_, errors_[at(p)], j, {first * side, begin}, sums);
    const GptqPanel panel = rows_[at(p)].panel(begin, channels, factor_.diagonal(j));
    float errors[kMaxTile];
    factor_.products().gptq_panel(&panel, sums, errors, rows_[at(p)].codes());
    errors_[at(p)].pack(j, errors, channels);
  }

  const GptqCall& call_;
  const FeedbackMatrix& factor_;
  int64_t count_ = 0;
  std::vector<RowPanel> rows_;
  std::vector<FeedbackErrors> errors_;
};

}  // namespace

void gptq_on_tiles(const GptqCall& call) {
  const Bf16Products& products = *call.table.bf16_products;
  const int64_t k = call.channels(), side = products.cols;
  const FeedbackTerms terms = FeedbackTerms::triangular(k);
  const FeedbackMatrix factor(products, terms, k, true, call.threads, [&](int64_t row, int64_t column, float* square) {
    fill_factor(call, side, row, column, square);
  });
  const int64_t panel_bytes = FeedbackErrors::size(products, terms, k) + k * side * 5;  // fp32, and a code
  for_row_tasks(
      call.weight.out_features, side, std::max<int64_t>(1, kFeedbackBytes / panel_bytes), call.threads,
      [&](int64_t panels) { return TaskRows(call, factor, terms, panels); },
      [](TaskRows& rows, int64_t first, int64_t end) { rows.round(first, end); });
}

}  // namespace awq
