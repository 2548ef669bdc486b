// Activation rows as the kernels of kernels/tile-inl.h read them: cut at groups, padded to steps, interleaved by blocks
// of rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "buffer.h"
#include "kernels/kernels.h"
#include "layout.h"

namespace awq {

struct InputView {
  const void* data;  // [rows, in_features], contiguous
  Dtype dtype;
  int64_t rows;
  int64_t in_features;
  const float* scale;  // [in_features] or null
};

// One at a time in a thread.
class Activations {
 public:
  // bf16: elements are pairs of bf16, else fp32. Blocks are of max_rows rows or, evenly, a little fewer.
  Activations(const KernelTable& table, const InputView& x, int64_t group_length, bool bf16, int64_t max_rows,
              int threads);

  int64_t blocks() const { return blocks_; }
  // Rows of a block, or of those before it.
  int rows(int64_t block) const { return static_cast<int>(rows_before(block + 1) - rows_before(block)); }
  int64_t rows_before(int64_t block) const { return block * (x_.rows / blocks_) + std::min(block, x_.rows % blocks_); }
  // What a block's rows hold from a step on.
  const void* at(int64_t block, int64_t step) const {
    return direct_ != nullptr
               ? direct_ + step * step_elements_
               : packed_.get() + rows_before(block) * row_elements_ + step * step_elements_ * rows(block);
  }

 private:
  void pack_block(const KernelTable& table, int64_t block, float* scratch);
  void make_row(const KernelTable& table, int64_t row, float* values, uint32_t* out) const;

  InputView x_;
  int64_t group_length_;
  bool bf16_;
  bool as_they_are_;  // no conversion, scale or padding: a row of x is a row of elements
  int64_t step_elements_;
  int64_t row_elements_;
  int64_t blocks_;
  const uint32_t* direct_ = nullptr;  // a single such row is not even copied
  Scratch<Activations, uint32_t> packed_;
};

}  // namespace awq
