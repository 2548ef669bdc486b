#include "drivers/feedback.h"

namespace awq {

void pack_terms(const Bf16Products& products, decltype(Bf16Products::pack_left) pack, int64_t width, int terms,
                float* square, uint16_t* out) {
  uint16_t term[kMaxTile];
  for (int t = 0; t < terms; ++t) {
    products.split(square, width * width, term);
    pack(term, width, width, width, terms, out + t * products.depth * width);
  }
}

FeedbackErrors::FeedbackErrors(const Bf16Products& products, const FeedbackTerms& terms, int64_t k)
    : products_(&products),
      side_(products.cols),
      exact_panels_(ceil_div(std::min(terms.exact, k), side_)),
      has_split_(terms.split),
      exact_(exact_panels_ * side_ * side_ * kExactTerms),
      split_(has_split_ ? round_up(k, side_) * side_ * kSplitTerms : 0),
      sums_(kSpanPanels * side_ * side_) {}

int64_t FeedbackErrors::size(const Bf16Products& products, const FeedbackTerms& terms, int64_t k) {
  const int64_t values = std::min(terms.exact, k) * kExactTerms + (terms.split ? k * kSplitTerms : 0);
  return values * products.cols * 2 + kSpanPanels * products.cols * products.rows * 4;
}

void FeedbackErrors::pack(int64_t panel, const float* errors, int64_t channels) {
  float square[kMaxTile];
  const int64_t size = side_ * side_;
  const auto copy = [&] {
    std::copy_n(errors, channels * side_, square);
    std::fill(square + channels * side_, square + size, 0.0f);
  };
  const auto pack_in = [&](int terms, Buffer<uint16_t>& out) {
    copy();
    pack_terms(*products_, products_->pack_right, side_, terms, square, out.get() + panel * size * terms);
  };
  if (panel < exact_panels_) pack_in(kExactTerms, exact_);
  if (has_split_) pack_in(kSplitTerms, split_);
}

void add_feedback(const FeedbackMatrix& m, FeedbackErrors* errors, int64_t rows, int64_t first, int64_t last,
                  const FeedbackRange& range) {
  const int64_t block = kTileBlockK / m.terms(first);
  for (int64_t from = range.from; from < range.to; from += block)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = first; j < last; ++j)
        add_feedback(m, errors[r], j, {from, std::min(range.to, from + block), range.origin},
                     errors[r].sums(j - first));
}

void add_feedback(const FeedbackMatrix& m, const FeedbackErrors& errors, int64_t panel, const FeedbackRange& range,
                  float* sums) {
  if (range.from >= range.to) return;
  const int terms = m.terms(panel);
  m.products().gemm(m.at(panel, range.from), errors.at(terms, range.from - range.origin), range.to - range.from, terms,
                    sums, m.side());
}

}  // namespace awq
