// Activation rows as the kernels of kernels/tile*-inl.h read them: cut into groups, padded to whole steps, interleaved
// in blocks of rows.
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

// What an element of 4 bytes holds:
//   f32        a number, four elements per step
//   bf16_pair  two numbers, two elements per step
//   int8_step  all numbers of a step; each run of steps comes after its sum and its scale (kernels.h)
enum class Element { f32, bf16_pair, int8_step };

// Only one object at a time in a thread.
class Activations {
 public:
  // Rows are split evenly into blocks of at most max_rows.
  Activations(const KernelTable& table, const InputView& x, int64_t group_length, Element element, int64_t max_rows,
              int threads);

  int64_t blocks() const { return blocks_; }
  // Rows of a block, and of all blocks before it.
  int rows(int64_t block) const { return static_cast<int>(rows_before(block + 1) - rows_before(block)); }
  int64_t rows_before(int64_t block) const { return block * (x_.rows / blocks_) + std::min(block, x_.rows % blocks_); }
  // The elements of a block's rows from a step on, which must be the first of a group, or of a run.
  const void* at(int64_t block, int64_t step) const {
    if (direct_ != nullptr) return direct_ + elements(step);
    return packed_.get() + rows_before(block) * row_elements_ + elements(step) * rows(block);
  }

 private:
  void pack_block(const KernelTable& table, int64_t block, float* scratch);
  void make_row(const KernelTable& table, int64_t row, float* values, uint32_t* out) const;
  void round_row(const KernelTable& table, const float* values, uint32_t* out) const;
  void quantize_row(const KernelTable& table, const float* values, uint32_t* out) const;
  // Number of a row's elements before a step.
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
  const uint32_t* direct_ = nullptr;  // x itself, if as_they_are_ and a single row: nothing is copied
  Scratch<Activations, uint32_t> packed_;
};

}  // namespace awq
