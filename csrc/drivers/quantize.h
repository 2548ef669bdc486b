// The group-wise affine quantizer over whole weights: rows in parallel, groups by the kernels.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace awq {

// N x K weights, contiguous, and how they are cut and rounded.
struct WeightView {
  const void* data;
  Dtype dtype;
  int64_t out_features;
  int64_t in_features;

  const void* row(int64_t n) const { return at(n, 0); }
  const void* at(int64_t n, int64_t channel) const {
    return static_cast<const char*>(data) + (n * in_features + channel) * dtype_bytes(dtype);
  }
};

// What a weight was quantized to.
struct CodesView {
  const uint8_t* codes;  // [N, K], or packed [N, ceil(K / 2)]
  bool packed;
  const void* scales;  // [N, G]
  Dtype scale_dtype;
  const uint8_t* zeros;  // [N, G]
  int64_t group_length;
};

struct QuantSpec {
  int64_t group_length;  // channels in a full group, 1..in_features
  int bits;              // 2..8
  bool symmetric;
  Dtype scale_dtype;  // f16 or bf16
};

// The grid of a group whose range is shrunk by `ratio`. The step is rounded to scale_dtype first; the zero point and
// the codes follow from the rounded step, so that a search measures the values that later run. A symmetric grid has one
// code more below its zero than above. The weight of largest magnitude gets the lowest code, 0, so the step is negative
// where that weight is positive.
Grid make_grid(const KernelTable& table, const Range& range, float ratio, const QuantSpec& spec);

// channel_scale [K] and clip [N, G] may be null. codes [N, K], scales [N, G] (bit patterns of scale_dtype), zeros [N,
// G].
void quantize_weight(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                     const float* channel_scale, const float* clip, uint8_t* codes, uint16_t* scales, uint8_t* zeros,
                     int threads);

// codes [N, K], scales and zeros [N, G] -> out fp32 [N, K].
void dequantize_weight(const KernelTable& table, const uint8_t* codes, const void* scales, Dtype scale_dtype,
                       const uint8_t* zeros, int64_t out_features, int64_t in_features, int64_t group_length,
                       float* out, int threads);

// Rows of K codes <-> rows of ceil(K / 2) bytes. Packing returns true if all codes are below 16.
bool pack_int4(const KernelTable& table, const uint8_t* codes, int64_t out_features, int64_t in_features,
               uint8_t* packed, int threads);
void unpack_int4(const KernelTable& table, const uint8_t* packed, int64_t out_features, int64_t in_features,
                 uint8_t* codes, int threads);

}  // namespace awq
