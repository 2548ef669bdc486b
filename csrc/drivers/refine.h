// Coordinate descent on the scales and codes of quantized weights.
//
// Lowers e H e^T of every row, e = weight * channel_scale - value and H = diag(1/s) moment diag(1/s) + damping * its
// diagonal (refine_objective.h). A scale or a code is set to its best value while all others stay. A scale is rounded
// to its storage type, and left as it was if its best value is far off. codes [N, K], zeros [N, G], scales [N, G] (bit
// patterns of spec.scale_dtype).
#pragma once

#include <cstdint>

#include "drivers/quantize.h"
#include "kernels/kernels.h"

namespace awq {

// In each round every scale in turn, then every code in turn; codes and scales are changed in place. Products are those
// of gptq_quantize.
void refine_quantized(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                      const float* channel_scale, const float* moment, double damping, int64_t rounds,
                      const uint8_t* zeros, uint8_t* codes, uint16_t* scales, int threads);

// In each round every scale in turn; scales are changed in place.
void refine_scales(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                   const float* channel_scale, const float* moment, double damping, int64_t rounds,
                   const uint8_t* zeros, const uint8_t* codes, uint16_t* scales, int threads);

}  // namespace awq
