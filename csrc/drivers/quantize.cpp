#include "drivers/quantize.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"

namespace awq {
namespace {

// Bounds of a scale: never 0, never infinite.
constexpr float kHalfMin = 0x1p-24f, kHalfMax = 65504.0f, kBf16Min = 0x1p-126f, kBf16Max = 0x1.fep127f;

// Rows go to threads in bundles of about this many channels: enough to outweigh the scheduling, few enough to balance.
constexpr int64_t kChannelsPerTask = 1 << 15;

int64_t rows_per_task(int64_t in_features) { return std::max<int64_t>(1, kChannelsPerTask / in_features); }

template <class Body>
void for_rows(int64_t out_features, int64_t in_features, int threads, const Body& body) {
  const int64_t bundle = rows_per_task(in_features);
  parallel_for(ceil_div(out_features, bundle), threads, [&](int64_t task, int thread) {
    for (int64_t n = task * bundle; n < std::min(out_features, (task + 1) * bundle); ++n) body(n, thread);
  });
}

}  // namespace

Grid make_grid(const KernelTable& table, const Range& range, float ratio, const QuantSpec& spec) {
  Grid grid;
  grid.top = static_cast<float>((1 << spec.bits) - 1);
  const float lo = range.lo * ratio, hi = range.hi * ratio;
  const float middle = static_cast<float>(1 << (spec.bits - 1));
  float step = spec.symmetric ? std::max(-lo, hi) / middle : (hi - lo) / grid.top;
  if (range.constant) step = std::fabs(range.first);
  const bool half = spec.scale_dtype == Dtype::f16;
  step = std::min(std::max(step, half ? kHalfMin : kBf16Min), half ? kHalfMax : kBf16Max);
  // The largest magnitude is code 0, which has no counterpart above the zero.
  if (spec.symmetric && !range.constant && hi > -lo) step = -step;
  table.from_float(&step, spec.scale_dtype, 1, &grid.scale_bits);
  table.to_float(&grid.scale_bits, spec.scale_dtype, 1, &grid.step);
  if (spec.symmetric) {
    grid.zero = middle;
  } else if (range.constant) {
    grid.zero = range.first < 0.0f ? 1.0f : 0.0f;
  } else {
    // nearbyint rounds half to even, the mode that every thread starts with. The result is clamped in fp32, before it
    // is converted to an integer; a NaN (from a NaN clip) becomes 0.
    const float zero = std::nearbyint(-lo / grid.step);
    grid.zero = zero > 0.0f ? std::min(zero, grid.top) : 0.0f;
  }
  return grid;
}

void quantize_weight(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                     const float* channel_scale, const float* clip, uint8_t* codes, uint16_t* scales, uint8_t* zeros,
                     int threads) {
  const int64_t k = weight.in_features, g = spec.group_length, groups = ceil_div(k, g);
  Buffer<float> scratch(threads * k);
  for_rows(weight.out_features, k, threads, [&](int64_t n, int thread) {
    float* row = scratch.get() + thread * k;
    table.to_float(weight.row(n), weight.dtype, k, row);
    if (channel_scale != nullptr) table.multiply(row, channel_scale, k, row);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t begin = i * g, length = std::min(g, k - begin), at = n * groups + i;
      const Range range = table.group_range(row + begin, length);
      const Grid grid = make_grid(table, range, clip == nullptr ? 1.0f : clip[at], spec);
      table.quantize_group(row + begin, length, &grid, codes + n * k + begin);
      scales[at] = grid.scale_bits;
      zeros[at] = static_cast<uint8_t>(grid.zero);
    }
  });
}

void dequantize_weight(const KernelTable& table, const uint8_t* codes, const void* scales, Dtype scale_dtype,
                       const uint8_t* zeros, int64_t out_features, int64_t in_features, int64_t group_length,
                       float* out, int threads) {
  const int64_t groups = ceil_div(in_features, group_length), scale_bytes = dtype_bytes(scale_dtype);
  Buffer<float> scratch(threads * groups);
  for_rows(out_features, in_features, threads, [&](int64_t n, int thread) {
    float* steps = scratch.get() + thread * groups;
    table.to_float(static_cast<const char*>(scales) + n * groups * scale_bytes, scale_dtype, groups, steps);
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t begin = i * group_length, length = std::min(group_length, in_features - begin);
      const int64_t at = n * in_features + begin;
      table.dequantize_group(codes + at, length, steps[i], static_cast<float>(zeros[n * groups + i]), out + at);
    }
  });
}

bool pack_int4(const KernelTable& table, const uint8_t* codes, int64_t out_features, int64_t in_features,
               uint8_t* packed, int threads) {
  const int64_t bytes = packed_bytes(in_features);
  std::atomic<bool> fit{true};
  for_rows(out_features, in_features, threads, [&](int64_t n, int) {
    if (table.pack_int4(codes + n * in_features, in_features, packed + n * bytes) > 15) fit = false;
  });
  return fit;
}

void unpack_int4(const KernelTable& table, const uint8_t* packed, int64_t out_features, int64_t in_features,
                 uint8_t* codes, int threads) {
  const int64_t bytes = packed_bytes(in_features);
  for_rows(out_features, in_features, threads,
           [&](int64_t n, int) { table.unpack_int4(packed + n * bytes, in_features, codes + n * in_features); });
}

}  // namespace awq
