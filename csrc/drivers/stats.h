// Statistics of calibration rows: sums of x and of |x|, and X^T X, added to as the rows stream by.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace awq {

// sum[k] += sum over rows of x[r, k] and abs_sum[k] += that of |x[r, k]|, in fp64, row after row. x contiguous [rows,
// in_features].
void add_sums(const KernelTable& table, const void* x, Dtype dtype, int64_t rows, int64_t in_features, double* sum,
              double* abs_sum, int threads);

// moment += X^T X in fp32, at least where column >= row; what is below is left in any state until mirror_upper. bf16
// rows use bf16 products where the level has them: the products are exact, so nothing is lost against fp32. Error of an
// entry: gamma * sum of |x_i x_j| with gamma = (rows of a chunk + number of chunks) * 2^-24.
void add_second_moment(const KernelTable& table, const void* x, Dtype dtype, int64_t rows, int64_t in_features,
                       float* moment, int threads);

// moment[j, i] = moment[i, j] for j > i.
void mirror_upper(float* moment, int64_t in_features, int threads);

}  // namespace awq
