// What the search for scales and clips asks for: output errors of a weight rounded under many candidates, from the
// second moment of its inputs alone.
#pragma once

#include <cstdint>

#include "drivers/quadratic.h"
#include "drivers/quantize.h"
#include "kernels/kernels.h"

namespace awq {

// losses[n] = e_n G e_n^T for the rows of error [N, K] (row stride K), G = moment [K, K]. In fp32, products and sums.
void quadratic_loss(const KernelTable& table, const float* error, int64_t rows, int64_t in_features,
                    const float* moment, double* losses, int threads);

// plain[n] = e_n G e_n^T, or 0 where rounding makes that negative, e_n the error of row n: its values, divided by
// channel_scale [K] and multiplied by divisor[n], minus the weight; either may be null. damped[n] = plain[n] + damping
// * sum over k of e_nk^2 G_kk; null: not wanted. The errors and plain in fp32 as quadratic_loss, the rest in fp64.
void code_losses(const KernelTable& table, const WeightView& weight, const CodesView& codes, const float* channel_scale,
                 const float* divisor, const float* moment, double damping, double* plain, double* damped, int threads);

// losses[c] = sum over rows of the error that rounding W diag(s_c) makes, taken back to the space of W. candidates [C,
// K]. 0 < max_rows < N: that many evenly spaced rows instead of all, which is a ranking, computed in
// ranking_precision().
void scale_losses(const KernelTable& table, const WeightView& weight, const QuantSpec& spec, const float* candidates,
                  int64_t count, const float* moment, int64_t max_rows, double* losses, int threads);

// chosen[n, g] = the ratio of least e_g G_gg e_g^T, the first of equals. channel_scale [K] may be null. In fp32.
void search_clip(const KernelTable& table, const WeightView& weight, const QuantSpec& spec, const float* channel_scale,
                 const float* moment, const float* ratios, int64_t ratio_count, float* chosen, int threads);

}  // namespace awq
