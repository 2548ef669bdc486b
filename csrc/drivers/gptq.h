// Rounding with error feedback: GPTQ (arXiv 2210.17323), in the form of Babai's nearest plane (arXiv 2507.18553).
//
// Channels are rounded one after another in a given order. With the (damped, reordered) second moment H = R R^T, R
// upper triangular, the output error of a row is
//
//     e H e^T = sum over j of (e_j R_jj + sum over i < j of e_i R_ij)^2,     e = weight - rounded weight,
//
// where term j holds errors up to channel j only. So channel j is rounded at w_j + (sum over i < j of e_i R_ij) / R_jj,
// which makes its term as small as the grid allows. The same codes as GPTQ's, which updates the remaining weights with
// rows of the Cholesky factor of H^-1 instead; but there is nothing to invert, and the sums are plain matrix products.
#pragma once

#include <cstdint>

#include "drivers/quantize.h"
#include "kernels/kernels.h"

namespace awq {

// Rows that the memory of a factor must have: the last tile of rows is always whole.
int64_t factor_rows(const KernelTable& table, int64_t in_features);

// factor [factor_rows][K], the first K rows of which become R, 0 below the diagonal:
//     R R^T = H + damping * diagonal of H + 1e-6 * its mean,
// H the moment, both axes reordered by `order` [K]. Where rounding makes that no longer positive definite, more is
// added. fp32 products and sums, fp64 inside diagonal blocks.
void gptq_factor(const KernelTable& table, const float* moment, int64_t in_features, const int64_t* order,
                 double damping, float* factor, int threads);

// Codes, scales and zeros as quantize_weight gives them, but with error feedback. The grids are those of the groups
// before any feedback, so that groups stay contiguous under any order. Inputs divided by channel_scale s have the
// second moment diag(1/s) H diag(1/s), and diag(1/s) R for its factor: one factor serves every s.
void gptq_quantize(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                   const float* channel_scale, const float* clip, const float* factor, const int64_t* order,
                   uint8_t* codes, uint16_t* scales, uint8_t* zeros, int threads);

}  // namespace awq
