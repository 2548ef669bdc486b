// The group quantizer, element by element as csrc/kernels/quantize-inl.h, and the error that it makes.
#include <cmath>

#include "base/layout.h"
#include "cuda/awq_cuda.h"
#include "cuda/warp.h"

namespace awq::cuda {
namespace {

struct Rounding {
  const void* weight;  // [n][k]
  Type type;
  int64_t n;
  int64_t k;
  int64_t group;
  int64_t groups;
  float top;  // 2^bits - 1
  bool symmetric;
  Type scale_type;
  const float* channel_scale;  // [k], or null
  const float* clip;           // [n][groups], or null
  uint8_t* codes;              // [n][k], or null: only `error` is wanted
  uint16_t* scales;            // [n][groups]
  uint8_t* zeros;              // [n][groups]
  float* error;                // or null: value / channel_scale - weight, as [groups][n][group] or [n][k]
  bool by_group;               // of `error`: groups outermost, a short last one padded with 0
};

struct Grid {
  float step;
  float zero;
  uint16_t bits;
};

// lo <= 0 <= hi, both times the clip. `constant`: all weights are `first`, which is not 0.
__device__ Grid make_grid(const Rounding& r, float lo, float hi, float first, bool constant) {
  // A scale is never 0, never infinite.
  const bool half = r.scale_type == Type::f16;
  const float smallest = half ? 0x1p-24f : 0x1p-126f, largest = half ? 65504.0f : 0x1.fep127f;
  const float middle = (r.top + 1.0f) / 2.0f;
  float step = r.symmetric ? (-lo > hi ? -lo : hi) / middle : (hi - lo) / r.top;
  if (constant) step = fabsf(first);
  step = step > smallest ? step : smallest;
  step = step < largest ? step : largest;
  // The largest magnitude is code 0, which has no counterpart above the zero.
  if (r.symmetric && !constant && hi > -lo) step = -step;
  Grid grid;
  grid.bits = bits_in(step, r.scale_type);
  grid.step = value_of(grid.bits, r.scale_type);
  if (r.symmetric) {
    grid.zero = middle;
  } else if (constant) {
    grid.zero = first < 0.0f ? 1.0f : 0.0f;
  } else {
    const float zero = nearbyintf(-lo / grid.step);
    grid.zero = zero > 0.0f ? (zero < r.top ? zero : r.top) : 0.0f;
  }
  return grid;
}

__device__ float code_of(float w, const Grid& grid, float top) {
  const float code = nearbyintf(w / grid.step) + grid.zero;
  return code > 0.0f ? (code < top ? code : top) : 0.0f;  // NaN: 0
}

// A warp for each group of a row.
__global__ void __launch_bounds__(kItemWarps* kWarp) round_groups(Rounding r) {
  const int64_t item = warp_item();
  if (item >= r.n * r.groups) return;
  const int64_t row = item / r.groups, group = item % r.groups, begin = group * r.group;
  const int64_t length = r.k - begin < r.group ? r.k - begin : r.group;
  const int lane = warp_lane();
  auto weight = [&](int64_t i) { return load(r.weight, r.type, row * r.k + begin + i); };
  auto scaled = [&](int64_t i) {
    return r.channel_scale == nullptr ? weight(i) : weight(i) * r.channel_scale[begin + i];
  };
  const float first = scaled(0);
  float lo = 0.0f, hi = 0.0f;
  int differ = 0;
  for (int64_t i = lane; i < length; i += kWarp) {
    const float w = scaled(i);
    lo = w < lo ? w : lo;
    hi = w > hi ? w : hi;
    differ |= w != first;
  }
  lo = warp_min(lo);
  hi = warp_max(hi);
  const bool constant = warp_sum(differ) == 0 && first != 0.0f;
  const float ratio = r.clip == nullptr ? 1.0f : r.clip[item];
  const Grid grid = make_grid(r, lo * ratio, hi * ratio, first, constant);
  for (int64_t i = lane; i < length; i += kWarp) {
    const float code = code_of(scaled(i), grid, r.top);
    if (r.codes != nullptr) r.codes[row * r.k + begin + i] = static_cast<uint8_t>(code);
    if (r.error == nullptr) continue;
    float value = (code - grid.zero) * grid.step;
    if (r.channel_scale != nullptr) value = value / r.channel_scale[begin + i];
    r.error[r.by_group ? (group * r.n + row) * r.group + i : row * r.k + begin + i] = value - weight(i);
  }
  if (r.error != nullptr && r.by_group)
    for (int64_t i = length + lane; i < r.group; i += kWarp) r.error[(group * r.n + row) * r.group + i] = 0.0f;
  if (lane > 0 || r.codes == nullptr) return;
  r.scales[item] = grid.bits;
  r.zeros[item] = static_cast<uint8_t>(grid.zero);
}

struct Quantized {
  const uint8_t* codes;  // [n][k]
  const void* scales;    // [n][groups]
  Type scale_type;
  const uint8_t* zeros;  // [n][groups]
  int64_t n;
  int64_t k;
  int64_t group;
  int64_t groups;
  const void* weight;  // [n][k]: subtracted; or null
  Type type;
  const float* channel_scale;  // [k]: values are divided by it; or null
  const float* divisor;        // [n]: values are multiplied by it; or null
  float* out;                  // [n][k]
};

__global__ void __launch_bounds__(kItemThreads) dequantize(Quantized q) {
  const int64_t i = thread_item();
  if (i >= q.n * q.k) return;
  const int64_t row = i / q.k, channel = i % q.k, at = row * q.groups + channel / q.group;
  const float level = static_cast<float>(q.codes[i]) - static_cast<float>(q.zeros[at]);
  float value = level * load(q.scales, q.scale_type, at);
  if (q.channel_scale != nullptr) value = value / q.channel_scale[channel];
  if (q.divisor != nullptr) value = value * q.divisor[row];
  q.out[i] = q.weight == nullptr ? value : value - load(q.weight, q.type, i);
}

}  // namespace
}  // namespace awq::cuda

using namespace awq::cuda;

int64_t awq_cuda_round(void* stream, const void* weight, int64_t type, int64_t n, int64_t k, int64_t group,
                       int64_t bits, int64_t symmetric, int64_t scale_type, const void* channel_scale, const void* clip,
                       void* codes, void* scales, void* zeros, void* error, int64_t by_group) {
  const Rounding r{weight,
                   static_cast<Type>(type),
                   n,
                   k,
                   group,
                   awq::ceil_div(k, group),
                   static_cast<float>((1 << bits) - 1),
                   symmetric != 0,
                   static_cast<Type>(scale_type),
                   static_cast<const float*>(channel_scale),
                   static_cast<const float*>(clip),
                   static_cast<uint8_t*>(codes),
                   static_cast<uint16_t*>(scales),
                   static_cast<uint8_t*>(zeros),
                   static_cast<float*>(error),
                   by_group != 0};
  return launch_warps(stream, r.n * r.groups, round_groups, r);
}

int64_t awq_cuda_dequantize(void* stream, const void* codes, const void* scales, int64_t scale_type, const void* zeros,
                            int64_t n, int64_t k, int64_t group, const void* weight, int64_t type,
                            const void* channel_scale, const void* divisor, void* out) {
  const Quantized q{static_cast<const uint8_t*>(codes),
                    scales,
                    static_cast<Type>(scale_type),
                    static_cast<const uint8_t*>(zeros),
                    n,
                    k,
                    group,
                    awq::ceil_div(k, group),
                    weight,
                    static_cast<Type>(type),
                    static_cast<const float*>(channel_scale),
                    static_cast<const float*>(divisor),
                    static_cast<float*>(out)};
  return launch_items(stream, n * k, dequantize, q);
}
