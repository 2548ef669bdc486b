#include <algorithm>
#include <vector>

#include "drivers/feedback.h"
#include "drivers/refine_rows.h"
#include "drivers/row_tasks.h"

namespace awq {
namespace {

// Weight rows of a task: up to `most` panels side by side.
class TaskRows {
 public:
  TaskRows(const RefineCall& call, const FeedbackMatrix& h, const FeedbackTerms& terms, int64_t most)
      : call_(call), h_(h), side_(h.side()), forms_(at(most)) {
    for (int64_t p = 0; p < most; ++p) {
      rows_.emplace_back(call, side_);
      errors_.emplace_back(h.products(), terms, call.channels());
      levels_.emplace_back(h.products(), terms, call.spec.group_length + 2 * side_);
    }
  }

  // Refines weight rows first .. end.
  void refine(int64_t first, int64_t end) {
    const ProductTask product_task(&h_.products());
    count_ = ceil_div(end - first, side_);
    const auto row = [&](int64_t p) { return first + p * side_; };
    for (int64_t p = 0; p < count_; ++p) rows_[at(p)].load(row(p), std::min(side_, end - row(p)));
    for (int64_t round = 0; round < call_.rounds; ++round) {
      for (int64_t p = 0; p < count_; ++p) pack_errors(p, 0, h_.count());
      for (int64_t g = 0; g < call_.groups(); ++g) refine_steps(g);
      for (int64_t panel = 0; panel < h_.count(); panel += kSpanPanels)
        refine_span(panel, std::min(h_.count(), panel + kSpanPanels));
      for (int64_t p = 0; p < count_; ++p) rows_[at(p)].measure();
    }
    for (int64_t p = 0; p < count_; ++p) rows_[at(p)].store(row(p), std::min(side_, end - row(p)));
  }

 private:
  static size_t at(int64_t p) { return static_cast<size_t>(p); }

  // Of panels first .. last.
  void pack_errors(int64_t p, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      errors_[at(p)].pack(i, rows_[at(p)].errors(i * side_), std::min(side_, call_.channels() - i * side_));
  }

  // The levels of group g, 0 in all other channels of panels first .. last.
  void pack_levels(int64_t p, int64_t g, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float square[kMaxTile] = {};
      const int64_t from = std::max(call_.begin(g), i * side_), to = std::min(call_.end(g), (i + 1) * side_);
      std::copy_n(rows_[at(p)].levels(from), (to - from) * side_, square + (from - i * side_) * side_);
      levels_[at(p)].pack(i - first, square, side_);
    }
  }

  // Sets the step of group g in every row to its best value.
  void refine_steps(int64_t g) {
    const int64_t first = call_.begin(g) / side_, last = ceil_div(call_.end(g), side_);
    for (int64_t p = 0; p < count_; ++p) {
      forms_[at(p)] = {};
      pack_levels(p, g, first, last);
    }
    for (int64_t j = first; j < last; j += kSpanPanels) add_forms(g, first, last, j);
    for (int64_t p = 0; p < count_; ++p) {
      rows_[at(p)].move_steps(g, forms_[at(p)]);
      pack_errors(p, first, last);
    }
  }

  // Adds what the span from panel j on gives to the forms of group g, which lies in panels first .. last.
  void add_forms(int64_t g, int64_t first, int64_t last, int64_t j) {
    const int64_t end = std::min(last, j + kSpanPanels), origin = first * side_;
    for (int64_t p = 0; p < count_; ++p) {
      errors_[at(p)].clear_sums();
      levels_[at(p)].clear_sums();
    }
    add_feedback(h_, errors_.data(), count_, j, end, {0, h_.padded_channels()});
    add_feedback(h_, levels_.data(), count_, j, end, {origin, last * side_, origin});
    const int64_t from = std::max(call_.begin(g), j * side_), skipped = (from - j * side_) * side_;
    for (int64_t p = 0; p < count_; ++p)
      rows_[at(p)].add_forms(from, std::min(call_.end(g), end * side_), errors_[at(p)].sums(0) + skipped,
                             levels_[at(p)].sums(0) + skipped, forms_[at(p)]);
  }

  // Sets each code of panels first .. last in turn to its best value.
  void refine_span(int64_t first, int64_t last) {
    for (int64_t p = 0; p < count_; ++p) errors_[at(p)].clear_sums();
    add_feedback(h_, errors_.data(), count_, first, last, {0, first * side_});
    add_feedback(h_, errors_.data(), count_, first, last, {last * side_, h_.padded_channels()});
    for (int64_t j = first; j < last; ++j)
      for (int64_t p = 0; p < count_; ++p) refine_codes(p, first, last, j);
  }

  void refine_codes(int64_t p, int64_t first, int64_t last, int64_t j) {
    const int64_t begin = j * side_;
    float* sums = errors_[at(p)].sums(j - first);
    add_feedback(h_, errors_[at(p)], j, {first * side_, begin}, sums);
    add_feedback(h_, errors_[at(p)], j, {begin + side_, last * side_}, sums);
    const GptqPanel panel = rows_[at(p)].panel(begin, std::min(side_, call_.channels() - begin), h_.diagonal(j));
    h_.products().gptq_panel(&panel, sums, rows_[at(p)].errors(begin), rows_[at(p)].codes());
    pack_errors(p, j, j + 1);
  }

  const RefineCall& call_;
  const FeedbackMatrix& h_;
  int64_t side_, count_ = 0;
  std::vector<RefinedRows> rows_;
  std::vector<FeedbackErrors> errors_,
      levels_;  // levels of one group; they take as many terms as errors, most of them 0
  std::vector<StepForms> forms_;
};

}  // namespace

void refine_on_tiles(const RefineCall& call) {
  const Bf16Products& products = *call.table.bf16_products;
  const int64_t k = call.channels(), side = products.cols;
  const FeedbackTerms terms = FeedbackTerms::square(k);
  const FeedbackMatrix h(products, terms, k, false, call.threads, [&](int64_t row, int64_t column, float* square) {
    const int64_t rows = std::min(side, k - row), columns = std::min(side, k - column);
    if (rows < side || columns < side) std::fill_n(square, side * side, 0.0f);
    for (int64_t i = 0; i < rows; ++i) call.h.row(row + i, column, columns, square + i * side);
  });
  // a row: three numbers in fp32, and a code
  const int64_t panel_bytes = FeedbackErrors::size(products, terms, k) + k * side * 13;
  for_row_tasks(
      call.weight.out_features, side, std::max<int64_t>(1, kFeedbackBytes / panel_bytes), call.threads,
      [&](int64_t panels) { return TaskRows(call, h, terms, panels); },
      [](TaskRows& rows, int64_t first, int64_t end) { rows.refine(first, end); });
}

}  // namespace awq
