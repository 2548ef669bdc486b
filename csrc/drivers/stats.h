// Streaming statistics of calibration rows: sums of x and of |x|, and X^T X.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace awq {

struct CalibrationRows {
  const void* data;  // [rows, in_features], contiguous
  Dtype dtype;
  int64_t rows;
  int64_t in_features;
  const float* weights;  // [rows], finite and >= 0; null: every row counts 1
  const float* roots;    // [rows], roots of the weights to one unit in the last place; null without weights

  const void* row(int64_t r) const { return at(r, 0); }
  const void* at(int64_t r, int64_t channel) const {
    return static_cast<const char*>(data) + (r * in_features + channel) * dtype_bytes(dtype);
  }
};

// sum[k] += sum over rows of w x[r, k] and abs_sum[k] += sum over rows of |root x[r, k]|, in fp64, row after row. w x
// is exact, root x is rounded to fp32.
void add_sums(const KernelTable& table, const CalibrationRows& x, double* sum, double* abs_sum, int threads);

// moment += sum over rows of w x x^T in fp32, at least where column >= row; below the diagonal anything may be left
// until mirror_upper. Without weights, bf16 rows use bf16 products where the level has them: these are exact, so
// nothing is lost against fp32. So do rows whose weights are all 0 or powers of 2: x is multiplied by w x, which is a
// bf16 number unless it is subnormal, and counts as 0 then, or overflows, and w x^2 with it: w < 2^128, so |x| > 1.
// With other weights, rows of root x are packed, rounded to fp32. Error of an entry: gamma * sum of |w x_i x_j| with
// gamma = (rows of a chunk + number of chunks) * 2^-24; with roots 6 * 2^-24 more, 3 for each factor: 2 from the root,
// 1 from its product with x.
//
// On tile registers fp16 rows have two terms, whose four products are exact, fp32 and rooted rows three, whose six
// products may leave out 2^-24 of |w x_i x_j| (Bf16Products). Sums are shorter there than gamma says: of 32 rows a term
// passes at most 16 sums and one for each product of terms, and those of small products are small.
void add_second_moment(const KernelTable& table, const CalibrationRows& x, float* moment, int threads);

// moment[j, i] = moment[i, j] for j > i.
void mirror_upper(float* moment, int64_t in_features, int threads);

// Multiplies the whole moment by factor.
void scale_moment(float* moment, int64_t in_features, float factor, int threads);

}  // namespace awq
