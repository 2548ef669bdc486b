// The scales of groups fitted to their codes, the codes as they are.
#pragma once

#include <cstdint>

#include "drivers/quantize.h"
#include "kernels/kernels.h"

namespace awq {

// Lowers e H e^T of every row, e = weight * channel_scale - value and H = diag(1/s) moment diag(1/s) + damping * its
// diagonal: in each round every scale in turn is set to its best value with all others as they stand, rounded to its
// storage type, and kept if its best value is far off. codes [N, K], zeros [N, G]; scales [N, G] (bit patterns of
// spec.scale_dtype) are changed in place.
void fit_scales(const KernelTable& table, const WeightView& weight, const QuantSpec& spec, const float* channel_scale,
                const float* moment, double damping, int64_t rounds, const uint8_t* zeros, const uint8_t* codes,
                uint16_t* scales, int threads);

}  // namespace awq
