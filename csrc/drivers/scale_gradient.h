// The gradient of y = x W^T with respect to the scales of W's groups, codes and zeros fixed.
#pragma once

#include <cstdint>

#include "drivers/linear.h"
#include "kernels/kernels.h"

namespace awq {

// out[n, g] = sum over rows r and channels k of group g of gradient[r, n] (code - zero)[n, k] x[r, k]: fp32 [N, G].
// gradient [rows, N] and x [rows, K], both contiguous and of `dtype`; input_scale fp32 [K] multiplies x first, or null.
//
// The gradient of the weight, [N, K], is never held: one register tile of it is made at a time and multiplied by the
// codes at once. Without input_scale, bf16 numbers go through bf16 products where the level has them, which are exact.
// Sums are fp32. Error of an entry: gamma * sum of |gradient (code - zero) x| with gamma = (rows of a chunk + channels
// of a group + number of chunks + 2) * 2^-24.
void scale_gradient(const KernelTable& table, const TiledWeight& weight, const void* gradient, const void* x,
                    Dtype dtype, int64_t rows, const float* input_scale, float* out, int threads);

}  // namespace awq
