// Coordinate descent on quantized weights: what a rounding left, scale by scale and code by code.
#pragma once

#include <cstdint>

#include "drivers/quantize.h"
#include "kernels/kernels.h"

namespace awq {

// Lowers e H e^T of every row, e = weight * channel_scale - value and H = diag(1/s) moment diag(1/s) + damping * its
// diagonal. In each round every scale in turn, then every code in turn, is set to its best value with all others as
// they stand; a scale is rounded to its storage type, and kept if its best value is far off. codes [N, K] and scales
// [N, G] (bit patterns of spec.scale_dtype) are changed in place, zeros [N, G] are not. The scales alone: fit.h.
void refine_quantized(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                      const float* channel_scale, const float* moment, double damping, int64_t rounds,
                      const uint8_t* zeros, uint8_t* codes, uint16_t* scales, int threads);

}  // namespace awq
