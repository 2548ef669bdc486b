// Rounding with error feedback: GPTQ (arXiv 2210.17323), in the form of Babai's nearest plane (arXiv 2507.18553).
//
// Channels are rounded one after another in a given order. With the (damped, reordered) second moment H = R R^T, R
// upper triangular, the output error of a row is
//
//     e H e^T = sum over j of (e_j R_jj + sum over i < j of e_i R_ij)^2,     e = weight - rounded weight,
//
// where term j depends on errors up to channel j only. So channel j rounds w_j + (sum over i < j of e_i R_ij) / R_jj,
// which makes its term as small as the grid allows. The codes are those of GPTQ, which updates the remaining weights
// with rows of the Cholesky factor of H^-1 instead. Here nothing is inverted, and the sums are plain matrix products.
#pragma once

#include <cstdint>

#include "drivers/quantize.h"
#include "kernels/kernels.h"

namespace awq {

// Rows of memory that a factor needs: those of whole tiles.
int64_t factor_rows(const KernelTable& table, int64_t in_features);

// Writes R, 0 below the diagonal, to the first K rows of factor [factor_rows][K]:
//     R R^T = H + damping * diagonal of H + 1e-6 * its mean,
// where H is the moment with both axes reordered by `order` [K]. Where rounding makes the sum no longer positive
// definite, more is added. fp32 products and sums, fp64 inside diagonal blocks; on tile registers products of three
// bf16 terms, which are as exact (factor_tiles.h).
void gptq_factor(const KernelTable& table, const float* moment, int64_t in_features, const int64_t* order,
                 double damping, float* factor, int threads);

// Codes, scales and zeros as quantize_weight gives them, but codes are rounded with error feedback. Grids are those of
// the groups before any feedback, so that groups stay contiguous under any order. Inputs divided by channel_scale s
// have the second moment diag(1/s) H diag(1/s), whose factor is diag(1/s) R: one R serves every s. Products are fp32,
// on tile registers of two or three bf16 terms (feedback.h).
void gptq_quantize(const KernelTable& table, const WeightView& weight, const QuantSpec& spec,
                   const float* channel_scale, const float* clip, const float* factor, const int64_t* order,
                   uint8_t* codes, uint16_t* scales, uint8_t* zeros, int threads);

}  // namespace awq
