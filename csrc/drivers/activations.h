// Activation rows as the kernels of kernels/tile*-inl.h read them: cut at groups, padded to steps, interleaved by
// blocks of rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/buffer.h"
#include "base/layout.h"
#include "kernels/kernels.h"

namespace awq {

struct InputView {
  const void* data;  // [rows, in_features], contiguous
  Dtype dtype;
  int64_t rows;
  int64_t in_features;
  const float* scale;  // [in_features] or null
};

// What the products are made of; each element has 4 bytes.
//   f32        numbers, four a step
//   bf16_pair  two a step
//   int8_step  all of a step; before each run of steps come its sum and its scale (kernels.h)
enum class Element { f32, bf16_pair, int8_step };

// One at a time in a thread.
class Activations {
 public:
  // Blocks are of max_rows rows or, evenly, a little fewer.
  Activations(const KernelTable& table, const InputView& x, int64_t group_length, Element element, int64_t max_rows,
              int threads);

  int64_t blocks() const { return blocks_; }
  // Rows of a block, or of those before it.
  int rows(int64_t block) const { return static_cast<int>(rows_before(block + 1) - rows_before(block)); }
  int64_t rows_before(int64_t block) const { return block * (x_.rows / blocks_) + std::min(block, x_.rows % blocks_); }
  // What a block's rows hold from a step on, which begins a group, or a run of one.
  const void* at(int64_t block, int64_t step) const {
    if (direct_ != nullptr) return direct_ + elements(step);
    return packed_.get() + rows_before(block) * row_elements_ + elements(step) * rows(block);
  }

 private:
  void pack_block(const KernelTable& table, int64_t block, float* scratch);
  void make_row(const KernelTable& table, int64_t row, float* values, uint32_t* out) const;
  void round_row(const KernelTable& table, const float* values, uint32_t* out) const;
  void quantize_row(const KernelTable& table, const float* values, uint32_t* out) const;
  // Of a row, before a step.
  int64_t elements(int64_t step) const {
    const int64_t runs = element_ == Element::int8_step ? run_count(step, group_length_, kRunSteps) : 0;
    return step * step_elements_ + 2 * runs;
  }

  InputView x_;
  int64_t group_length_;
  Element element_;
  bool as_they_are_;  // no conversion, scale or padding: a row of x is a row of elements
  int64_t step_elements_;
  int64_t row_elements_;
  int64_t blocks_;
  const uint32_t* direct_ = nullptr;  // a single such row is not even copied
  Scratch<Activations, uint32_t> packed_;
};

}  // namespace awq
