#include "drivers/activations.h"

#include <cstring>

#include "base/parallel.h"

namespace awq {
namespace {

// Packing fewer numbers than this takes less time than waking the threads.
constexpr int64_t kSerialNumbers = 1 << 16;

int64_t elements_of_step(Element element) {
  return element == Element::f32 ? kStepChannels : element == Element::bf16_pair ? kStepChannels / 2 : 1;
}

// Whether numbers of this type already are elements of this kind in memory.
bool same(Dtype dtype, Element element) {
  return (element == Element::f32 && dtype == Dtype::f32) || (element == Element::bf16_pair && dtype == Dtype::bf16);
}

}  // namespace

Activations::Activations(const KernelTable& table, const InputView& x, int64_t group_length, Element element,
                         int64_t max_rows, int threads)
    : x_(x),
      group_length_(group_length),
      element_(element),
      step_elements_(elements_of_step(element)),
      row_elements_(elements(step_count(x.in_features, group_length))),
      packed_(x.rows * row_elements_) {
  blocks_ = ceil_div(x.rows, max_rows);
  const bool whole = step_count(x.in_features, group_length) * kStepChannels == x.in_features;
  as_they_are_ = x.scale == nullptr && same(x.dtype, element) && whole;
  if (as_they_are_ && x.rows == 1 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0) {
    direct_ = static_cast<const uint32_t*>(x.data);
    return;
  }
  const int workers = x.rows * x.in_features < kSerialNumbers ? 1 : threads;
  const int64_t scratch_size = as_they_are_ ? 0 : x.in_features + rows(0) * row_elements_;
  Buffer<float> scratch(workers * scratch_size);
  parallel_for<Threads::team_or_helpers>(blocks_, workers, [&](int64_t block, int thread) {
    pack_block(table, block, scratch.get() + thread * scratch_size);
  });
}

void Activations::pack_block(const KernelTable& table, int64_t block, float* scratch) {
  const int count = rows(block);
  const int64_t first = rows_before(block);
  uint32_t* out = packed_.get() + first * row_elements_;
  if (as_they_are_) {
    const char* from = static_cast<const char*>(x_.data) + first * x_.in_features * dtype_bytes(x_.dtype);
    table.interleave(from, row_elements_, row_elements_, count, out);
    return;
  }
  uint32_t* made = count == 1 ? out : reinterpret_cast<uint32_t*>(scratch + x_.in_features);
  for (int m = 0; m < count; ++m) make_row(table, first + m, scratch, made + m * row_elements_);
  if (count > 1) table.interleave(made, row_elements_, row_elements_, count, out);
}

void Activations::make_row(const KernelTable& table, int64_t row, float* values, uint32_t* out) const {
  const int64_t k = x_.in_features;
  table.to_float(static_cast<const char*>(x_.data) + row * k * dtype_bytes(x_.dtype), x_.dtype, k, values);
  if (x_.scale != nullptr) table.multiply(values, x_.scale, k, values);
  if (element_ == Element::int8_step)
    quantize_row(table, values, out);
  else
    round_row(table, values, out);
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

void Activations::quantize_row(const KernelTable& table, const float* values, uint32_t* out) const {
  constexpr int64_t kRunChannels = kRunSteps * kStepChannels;
  for (int64_t group = 0, end; group < x_.in_features; group = end) {
    end = std::min(group + group_length_, x_.in_features);
    for (int64_t begin = group; begin < end; begin += kRunChannels) {
      const int64_t length = std::min(kRunChannels, end - begin);
      const Int8Run run = table.quantize_int8(values + begin, length, out + 2);
      const int32_t correction = -run.sum;
      std::memcpy(out, &correction, 4);
      std::memcpy(out + 1, &run.scale, 4);
      out += 2 + ceil_div(length, kStepChannels);
    }
  }
}

}  // namespace awq
