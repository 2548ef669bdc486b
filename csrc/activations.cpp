#include "activations.h"

#include <cstring>

#include "parallel.h"

namespace awq {
namespace {

// Below this many elements packing is shorter than waking the threads.
constexpr int64_t kSerialElements = 1 << 15;

int64_t element_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

}  // namespace

Activations::Activations(const KernelTable& table, const InputView& x, int64_t group_length, bool bf16,
                         int64_t max_rows, int threads)
    : x_(x),
      group_length_(group_length),
      bf16_(bf16),
      step_elements_(bf16 ? kStepChannels / 2 : kStepChannels),
      row_elements_(step_count(x.in_features, group_length) * step_elements_),
      packed_(x.rows * row_elements_) {
  const int64_t steps = row_elements_ / step_elements_;
  blocks_ = ceil_div(x.rows, max_rows);
  as_they_are_ =
      x.scale == nullptr && x.dtype == (bf16 ? Dtype::bf16 : Dtype::f32) && steps * kStepChannels == x.in_features;
  if (as_they_are_ && x.rows == 1 && reinterpret_cast<uintptr_t>(x.data) % 4 == 0) {
    direct_ = static_cast<const uint32_t*>(x.data);
    return;
  }
  const int workers = x.rows * row_elements_ < kSerialElements ? 1 : threads;
  const int64_t scratch_size = as_they_are_ ? 0 : x.in_features + rows(0) * row_elements_;
  Buffer<float> scratch(workers * scratch_size);
  parallel_for(blocks_, workers,
               [&](int64_t block, int thread) { pack_block(table, block, scratch.get() + thread * scratch_size); });
}

void Activations::pack_block(const KernelTable& table, int64_t block, float* scratch) {
  const int count = rows(block);
  const int64_t first = rows_before(block);
  uint32_t* out = packed_.get() + first * row_elements_;
  if (as_they_are_) {
    const char* from = static_cast<const char*>(x_.data) + first * x_.in_features * element_bytes(x_.dtype);
    table.interleave(from, row_elements_, row_elements_, count, out);
    return;
  }
  uint32_t* made = count == 1 ? out : reinterpret_cast<uint32_t*>(scratch + x_.in_features);
  for (int m = 0; m < count; ++m) make_row(table, first + m, scratch, made + m * row_elements_);
  if (count > 1) table.interleave(made, row_elements_, row_elements_, count, out);
}

void Activations::make_row(const KernelTable& table, int64_t row, float* values, uint32_t* out) const {
  const int64_t k = x_.in_features;
  table.to_float(static_cast<const char*>(x_.data) + row * k * element_bytes(x_.dtype), x_.dtype, k, values);
  if (x_.scale != nullptr) table.multiply(values, x_.scale, k, values);
  std::memset(out, 0, static_cast<size_t>(row_elements_) * 4);
  for (int64_t begin = 0; begin < k; begin += group_length_) {
    const int64_t length = std::min(group_length_, k - begin);
    table.from_float(values + begin, bf16_ ? Dtype::bf16 : Dtype::f32, length, out);
    out += ceil_div(length, kStepChannels) * step_elements_;
  }
}

}  // namespace awq
