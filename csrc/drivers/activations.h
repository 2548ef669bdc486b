// Activation rows as the kernels of kernels/tile*-inl.h read them: cut into groups, padded to whole steps, then
// interleaved in blocks of rows, or laid out in tiles.
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
//   bf16_tile, int8_tile  the last two in the tiles of TileProducts (kernels.h)
enum class Element { f32, bf16_pair, int8_step, bf16_tile, int8_tile };

constexpr bool on_tiles(Element element) { return element == Element::bf16_tile || element == Element::int8_tile; }
constexpr bool in_bytes(Element element) { return element == Element::int8_step || element == Element::int8_tile; }

// A row of activations may be held as several rows of elements, its terms, whose products are added: the first rounds
// the row, each of the others what is left of it. In bf16, three terms hold every bit of a float, and two those of a
// half, apart from what is subnormal as a bf16 (Bf16Products::split); with eight bits see choice.cpp. An
// activation that is not finite makes a row's results NaN in bytes; in bf16 it is its own first term.
//
// Only one object at a time in a thread.
class Activations {
 public:
  // Rows are split evenly into blocks of at most max_rows rows of elements.
  Activations(const KernelTable& table, const InputView& x, int64_t group_length, Element element, int terms,
              int64_t max_rows, int threads);

  int64_t blocks() const { return blocks_; }
  // Rows of elements of a block, and of all blocks before it.
  int rows(int64_t block) const { return static_cast<int>(inputs(block) * terms_); }
  int64_t rows_before(int64_t block) const { return inputs_before(block) * terms_; }
  // The elements of a block's rows from a step on, which must be the first of a group, or of a run.
  const void* at(int64_t block, int64_t step) const;

 private:
  int64_t inputs(int64_t block) const { return inputs_before(block + 1) - inputs_before(block); }
  int64_t inputs_before(int64_t block) const {
    return block * (x_.rows / blocks_) + std::min(block, x_.rows % blocks_);
  }
  void pack_block(const KernelTable& table, int64_t block, float* scratch);
  // Writes the terms of an input row, row_elements_ apart. values: scratch of in_features floats.
  void make_terms(const KernelTable& table, int64_t input, float* values, uint32_t* out) const;
  void round_row(const KernelTable& table, const float* values, uint32_t* out) const;
  void split_row(const KernelTable& table, float* values, uint32_t* out) const;
  void quantize_row(const KernelTable& table, const float* values, float* rest, uint32_t* out) const;
  void make_tiles(const uint32_t* rows, int count, uint32_t* out) const;
  // Number of a row's elements before a step.
  int64_t elements(int64_t step) const {
    const int64_t runs = in_bytes(element_) ? run_count(step, group_length_, kRunSteps) : 0;
    return step * step_elements_ + 2 * runs;
  }
  int halves(int64_t block) const { return rows(block) > kTileBlockRows ? 2 : 1; }
  // Words of a block's tiles before a step, for each half.
  int64_t tile_words(int64_t step) const;

  InputView x_;
  int64_t group_length_;
  Element element_;
  int terms_;
  bool as_they_are_;  // no conversion, scale or padding: a row of x is a row of elements
  int64_t step_elements_;
  int64_t row_elements_;
  int64_t blocks_;
  int64_t block_words_;               // from one block to the next, of tiles
  const uint32_t* direct_ = nullptr;  // x itself, if as_they_are_ and a single row: nothing is copied
  Scratch<Activations, uint32_t> packed_;
};

}  // namespace awq
