// Sums of errors times the columns of a K x K matrix M on tile registers: nearly all of the work of error feedback
// (gptq.cpp, where M is a triangular factor) and of descent on codes (refine.cpp, where it is a second moment).
//
// Channels are done one panel after another, a panel being as many channels as a tile has rows, and errors change on
// the way. So errors are packed again by the panel, when it is done, and M is packed once. Panels are done in spans:
// what errors outside of a span give to its sums comes first, in large products; from within it, panel by panel.
//
// Precision. Let eps = 2^-24. A sum of n products M_ij e_i by fp32 FMA is off by at most n eps times the sum of
// |M_ij e_i|. In bf16 terms (Bf16Products) it is off by
//     what is left out     3 terms, 6 products: 1 eps;  2 terms, 4 products: 256 eps (quadratic.h)
//     sums within a tile   18 eps: each product passes 16 of its kind, then these two, then the sum before
//     later products       6 or 4 for each 32 channels of a block of k, at most 23 eps
//     sums of blocks       one for each block of 128 or 192 channels
// So three terms are as good as fp32 from the first panel on, where n = 32, and better than it soon after. Two terms
// are where n is at least kSplitChannels, 512: there they may be off by 300 + n / 192.
//
// Cost, an estimate from counts, not measured (Emerald Rapids): 32 x 32 sums over 32 channels take 64 cycles for each
// product of terms, 256 with two terms and 384 with three, where fp32 FMA takes 1024 at two a cycle. (Measured alone,
// tiles reached 2.0 to 2.7 TFLOP/s there and FMA 0.29 to 0.34: only half of that gain.) For these 256 cycles 4 KiB of
// each factor are read. Errors come from the first-level cache, where their block of k serves all panels of a span; M
// from the second-level one, 16 bytes a cycle, where a block of the span's panels (192 KiB) serves all rows of a task.
// Beyond it, 4 KiB of errors are read in 8 x 256 cycles, and of M in as many as the task has panels of rows.
#pragma once

#include <algorithm>
#include <vector>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"
#include "drivers/products.h"
#include "drivers/quadratic.h"

namespace awq {

constexpr int kExactTerms = 3;
constexpr int64_t kSpanPanels = 8;
// Scratch memory of a task: its rows share each block of M, which is read from memory or a cache that all cores share.
constexpr int64_t kFeedbackBytes = 16 << 20;

// How many terms sums take.
struct FeedbackTerms {
  int64_t exact;  // the first channels whose sums have kExactTerms: a multiple of a span's, or all
  bool split;     // whether others follow, with kSplitTerms

  // Channel j adds up errors of the j channels before it.
  static FeedbackTerms triangular(int64_t k) { return {std::min(k, kSplitChannels), k > kSplitChannels}; }
  // Every channel adds up the errors of all.
  static FeedbackTerms square(int64_t k) {
    return k < kSplitChannels ? FeedbackTerms{k, false} : FeedbackTerms{0, true};
  }
  int of(int64_t channel) const { return channel < exact ? kExactTerms : kSplitTerms; }
};

// Packs a square of `width` x `width` values in terms, as a part of a panel. For tiles that are as wide as they are
// high and deep, which those of tile registers are. The square is scratch afterwards.
void pack_terms(const Bf16Products& products, decltype(Bf16Products::pack_left) pack, int64_t width, int terms,
                float* square, uint16_t* out);

// M as left panels, and its diagonal blocks in fp32.
class FeedbackMatrix {
 public:
  // upper: nothing below the diagonal. fill(row, column, square) writes the entries from there on, as many rows and
  // columns as a tile has, 0 past the last channel.
  template <class Fill>
  FeedbackMatrix(const Bf16Products& products, const FeedbackTerms& terms, int64_t k, bool upper, int threads,
                 const Fill& fill);

  const Bf16Products& products() const { return *products_; }
  int64_t side() const { return side_; }
  int64_t count() const { return count_; }
  int64_t padded_channels() const { return count_ * side_; }
  int terms(int64_t panel) const { return terms_.of(panel * side_); }
  const uint16_t* at(int64_t panel, int64_t row) const {
    return data_.get() + offsets_[static_cast<size_t>(panel)] + row * side_ * terms(panel);
  }
  const float* diagonal(int64_t panel) const { return diagonal_.get() + panel * side_ * side_; }

 private:
  const Bf16Products* products_;
  FeedbackTerms terms_;
  int64_t side_, count_;
  std::vector<int64_t> offsets_;
  Buffer<uint16_t> data_;
  Buffer<float> diagonal_;
};

// Errors of as many weight rows as a tile has columns, as right panels, and room for the sums of a span.
class FeedbackErrors {
 public:
  // Of channels 0 .. k.
  FeedbackErrors(const Bf16Products& products, const FeedbackTerms& terms, int64_t k);

  // Packs the errors of one panel, [channels][rows]; channels of the panel past these get 0.
  void pack(int64_t panel, const float* errors, int64_t channels);
  const uint16_t* at(int terms, int64_t channel) const {
    return (terms == kExactTerms ? exact_ : split_).get() + channel * side_ * terms;
  }
  float* sums(int64_t panel_of_span) { return sums_.get() + panel_of_span * side_ * side_; }
  void clear_sums() { std::fill_n(sums_.get(), kSpanPanels * side_ * side_, 0.0f); }
  // In bytes, about.
  static int64_t size(const Bf16Products& products, const FeedbackTerms& terms, int64_t k);

 private:
  const Bf16Products* products_;
  int64_t side_, exact_panels_;
  bool has_split_;
  Buffer<uint16_t> exact_, split_;
  Buffer<float> sums_;
};

// Channels from .. to (whole panels) of M and of errors whose first channel is `origin`.
struct FeedbackRange {
  int64_t from, to;
  int64_t origin = 0;
};

// Adds to sums(0), sums(1), .. of each of `rows` errors what the range gives to panels first .. last. To be called
// within a ProductTask.
void add_feedback(const FeedbackMatrix& m, FeedbackErrors* errors, int64_t rows, int64_t first, int64_t last,
                  const FeedbackRange& range);
// The same for one panel and one of the errors.
void add_feedback(const FeedbackMatrix& m, const FeedbackErrors& errors, int64_t panel, const FeedbackRange& range,
                  float* sums);

template <class Fill>
FeedbackMatrix::FeedbackMatrix(const Bf16Products& products, const FeedbackTerms& terms, int64_t k, bool upper,
                               int threads, const Fill& fill)
    : products_(&products), terms_(terms), side_(products.rows), count_(ceil_div(k, side_)) {
  int64_t size = 0;
  for (int64_t j = 0; j < count_; ++j) {
    offsets_.push_back(size);
    size += (upper ? j : count_) * side_ * side_ * this->terms(j);
  }
  data_ = Buffer<uint16_t>(size);
  diagonal_ = Buffer<float>(count_ * side_ * side_);
  parallel_for(count_, threads, [&](int64_t task, int) {
    float square[kMaxTile];
    const int64_t j = count_ - 1 - task;  // the longest first
    for (int64_t i = 0; i < (upper ? j : count_); ++i) {
      fill(i * side_, j * side_, square);
      pack_terms(products, products.pack_left, side_, this->terms(j), square,
                 data_.get() + offsets_[static_cast<size_t>(j)] + i * side_ * side_ * this->terms(j));
    }
    fill(j * side_, j * side_, diagonal_.get() + j * side_ * side_);
  });
}

}  // namespace awq
