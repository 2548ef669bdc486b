// The search for scales and clips: output errors of a weight rounded under many candidates, computed from the second
// moment of its inputs alone.
#pragma once

#include <cstdint>

#include "drivers/quadratic.h"
#include "drivers/quantize.h"
#include "kernels/kernels.h"

namespace awq {

// losses[n] = e_n G e_n^T for the rows of error [N, K] (row stride K), G = moment [K, K]. In loss_precision(): as in
// fp32.
void quadratic_loss(const KernelTable& table, const float* error, int64_t rows, int64_t in_features,
                    const float* moment, double* losses, int threads);

// plain[n] = e_n G e_n^T, or 0 where rounding makes that negative. e_n is the error of row n: its dequantized values,
// divided by channel_scale [K] and multiplied by divisor[n] (either may be null), minus the weight. damped[n] =
// plain[n]
// + damping * sum over k of e_nk^2 G_kk, unless damped is null. Errors are computed in fp32, plain like
// quadratic_loss, the rest in fp64.
void code_losses(const KernelTable& table, const WeightView& weight, const CodesView& codes, const float* channel_scale,
                 const float* divisor, const float* moment, double damping, bool ranking, double* plain, double* damped,
                 int threads);

// losses[c] = sum over rows of the error of rounding W diag(s_c), taken back to the space of W. candidates [C, K]. With
// 0 < max_rows < N only so many evenly spaced rows are used; the losses then serve a ranking, and are computed in
// ranking_precision().
void scale_losses(const KernelTable& table, const WeightView& weight, const QuantSpec& spec, const float* candidates,
                  int64_t count, const float* moment, int64_t max_rows, double* losses, int threads);

// chosen[n, g] = the ratio with the least e_g G_gg e_g^T, the first of equal ones. channel_scale [K] may be null. In
// ranking_precision().
void search_clip(const KernelTable& table, const WeightView& weight, const QuantSpec& spec, const float* channel_scale,
                 const float* moment, const float* ratios, int64_t ratio_count, float* chosen, int threads);

}  // namespace awq
