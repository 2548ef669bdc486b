#include "drivers/activations.h"

#include <cstring>

#include "base/parallel.h"

namespace awq {
namespace {

// Packing fewer numbers than this takes less time than waking the threads.
constexpr int64_t kSerialNumbers = 1 << 16;

// Words between blocks of tiles. Without them, parts of blocks of a power of two of channels would all come to the same
// places of the second-level cache: three times as slow.
constexpr int64_t kApart = 4096;

int64_t elements_of_step(Element element) {
  if (in_bytes(element)) return 1;
  return element == Element::f32 ? kStepChannels : kStepChannels / 2;
}

// Whether numbers of this type already are elements of this kind in memory.
bool same(Dtype dtype, Element element) {
  return element == Element::f32 ? dtype == Dtype::f32 : !in_bytes(element) && dtype == Dtype::bf16;
}

}  // namespace

Activations::Activations(const KernelTable& table, const InputView& x, int64_t group_length, Element element, int terms,
                         int64_t max_rows, int threads)
    : x_(x),
      group_length_(group_length),
      element_(element),
      terms_(terms),
      step_elements_(elements_of_step(element)),
      row_elements_(elements(step_count(x.in_features, group_length))),
      blocks_(ceil_div(x.rows, std::max<int64_t>(1, max_rows / terms))),
      block_words_(on_tiles(element) ? halves(0) * tile_words(step_count(x.in_features, group_length)) + kApart : 0),
      packed_(on_tiles(element) ? blocks_ * block_words_ : x.rows * terms * row_elements_) {
  const bool whole = step_count(x.in_features, group_length) * kStepChannels == x.in_features;
  as_they_are_ = x.scale == nullptr && terms == 1 && same(x.dtype, element) && whole;
  if (as_they_are_ && !on_tiles(element) && x.rows == 1 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0) {
    direct_ = static_cast<const uint32_t*>(x.data);
    return;
  }
  const int workers = x.rows * x.in_features < kSerialNumbers ? 1 : threads;
  const int64_t scratch_size = x.in_features + rows(0) * row_elements_;
  Buffer<float> scratch(workers * scratch_size);
  parallel_for<Threads::team_or_helpers>(blocks_, workers, [&](int64_t block, int thread) {
    pack_block(table, block, scratch.get() + thread * scratch_size);
  });
}

int64_t Activations::tile_words(int64_t step) const {
  const int64_t run_steps = in_bytes(element_) ? kRunSteps : kTileRunSteps,
                group = ceil_div(group_length_, kStepChannels);
  const int64_t depth = std::min<int64_t>(kTileBlockRows, group * step_elements_);
  const auto tiles = [&](int64_t steps) {  // of a group: runs are whole tiles, apart from its last
    return ceil_div(steps * step_elements_, depth);
  };
  static_assert(kRunSteps % kTileBlockRows == 0 && kTileRunSteps % kTileBlockRows == 0);
  const int64_t count = step / group * tiles(group) + tiles(step % group);
  const int64_t runs = in_bytes(element_) ? run_count(step, group_length_, run_steps) : 0;
  return count * kTileBlockRows * kTileBlockRows + runs * 2 * kTileBlockRows;
}

const void* Activations::at(int64_t block, int64_t step) const {
  if (direct_ != nullptr) return direct_ + elements(step);
  if (on_tiles(element_)) return packed_.get() + block * block_words_ + halves(block) * tile_words(step);
  return packed_.get() + rows_before(block) * row_elements_ + elements(step) * rows(block);
}

void Activations::pack_block(const KernelTable& table, int64_t block, float* scratch) {
  const int count = rows(block);
  uint32_t* made = reinterpret_cast<uint32_t*>(scratch + x_.in_features);
  uint32_t* out = packed_.get() + (on_tiles(element_) ? block * block_words_ : rows_before(block) * row_elements_);
  if (as_they_are_) {
    const char* from = static_cast<const char*>(x_.data) + rows_before(block) * x_.in_features * dtype_bytes(x_.dtype);
    if (!on_tiles(element_)) return table.interleave(from, row_elements_, row_elements_, count, out);
    if (reinterpret_cast<uintptr_t>(from) % 4 == 0)
      return make_tiles(reinterpret_cast<const uint32_t*>(from), count, out);
    std::memcpy(made, from, static_cast<size_t>(count * row_elements_) * 4);
    return make_tiles(made, count, out);
  }
  if (count == 1 && !on_tiles(element_)) made = out;
  for (int64_t i = 0; i < inputs(block); ++i)
    make_terms(table, inputs_before(block) + i, scratch, made + i * terms_ * row_elements_);
  if (on_tiles(element_)) return make_tiles(made, count, out);
  if (count > 1) table.interleave(made, row_elements_, row_elements_, count, out);
}

void Activations::make_terms(const KernelTable& table, int64_t input, float* values, uint32_t* out) const {
  const int64_t k = x_.in_features;
  table.to_float(static_cast<const char*>(x_.data) + input * k * dtype_bytes(x_.dtype), x_.dtype, k, values);
  if (x_.scale != nullptr) table.multiply(values, x_.scale, k, values);
  if (!in_bytes(element_) && terms_ == 1) return round_row(table, values, out);
  for (int t = 0; t < terms_; ++t, out += row_elements_) {
    if (in_bytes(element_))
      quantize_row(table, values, t + 1 < terms_ ? values : nullptr, out);
    else
      split_row(table, values, out);
  }
}

void Activations::round_row(const KernelTable& table, const float* values, uint32_t* out) const {
  const Dtype dtype = element_ == Element::f32 ? Dtype::f32 : Dtype::bf16;
  std::memset(out, 0, static_cast<size_t>(row_elements_) * 4);
  for (int64_t begin = 0; begin < x_.in_features; begin += group_length_) {
    const int64_t length = std::min(group_length_, x_.in_features - begin);
    table.from_float(values + begin, dtype, length, out);
    out += ceil_div(length, kStepChannels) * step_elements_;
  }
}

// Takes a term off the values, as a row of bf16.
void Activations::split_row(const KernelTable& table, float* values, uint32_t* out) const {
  std::memset(out, 0, static_cast<size_t>(row_elements_) * 4);
  for (int64_t begin = 0; begin < x_.in_features; begin += group_length_) {
    const int64_t length = std::min(group_length_, x_.in_features - begin);
    table.bf16_products->split(values + begin, length, reinterpret_cast<uint16_t*>(out));
    out += ceil_div(length, kStepChannels) * step_elements_;
  }
}

void Activations::quantize_row(const KernelTable& table, const float* values, float* rest, uint32_t* out) const {
  constexpr int64_t kRunChannels = kRunSteps * kStepChannels;
  for (int64_t group = 0, end; group < x_.in_features; group = end) {
    end = std::min(group + group_length_, x_.in_features);
    for (int64_t begin = group; begin < end; begin += kRunChannels) {
      const int64_t length = std::min(kRunChannels, end - begin);
      const Int8Run run =
          table.quantize_int8(values + begin, length, out + 2, rest == nullptr ? nullptr : rest + begin);
      const int32_t correction = -run.sum;
      std::memcpy(out, &correction, 4);
      std::memcpy(out + 1, &run.scale, 4);
      out += 2 + ceil_div(length, kStepChannels);
    }
  }
}

void Activations::make_tiles(const uint32_t* rows, int count, uint32_t* out) const {
  constexpr int64_t kSide = kTileBlockRows;
  const int64_t sides = count > kSide ? 2 : 1, group = ceil_div(group_length_, kStepChannels);
  const int64_t run_steps = in_bytes(element_) ? kRunSteps : kTileRunSteps;
  const int64_t depth = std::min(kSide, group * step_elements_);
  for (int64_t begin = 0; begin < x_.in_features; begin += group_length_) {
    int64_t left = ceil_div(std::min(group_length_, x_.in_features - begin), kStepChannels);
    for (int64_t steps; left > 0; left -= steps) {
      steps = std::min(left, run_steps);
      const int64_t words = steps * step_elements_, tiles = ceil_div(words, depth);
      if (in_bytes(element_)) {
        std::memset(out, 0, static_cast<size_t>(2 * sides * kSide) * 4);
        for (int64_t m = 0; m < count; ++m)
          for (int64_t i = 0; i < 2; ++i) out[i * sides * kSide + m] = rows[m * row_elements_ + i];
        out += 2 * sides * kSide;
        rows += 2;
      }
      const int64_t size = tiles * sides * kSide * kSide;
      if (depth < kSide || words % depth != 0 || count < sides * kSide)
        std::memset(out, 0, static_cast<size_t>(size) * 4);
      for (int64_t m = 0; m < count; ++m)
        for (int64_t t = 0; t < tiles; ++t)
          std::memcpy(out + (t * sides + m / kSide) * kSide * kSide + m % kSide * kSide,
                      rows + m * row_elements_ + t * depth,
                      static_cast<size_t>(std::min(depth, words - t * depth)) * 4);
      out += size;
      rows += words;
    }
  }
}

}  // namespace awq
