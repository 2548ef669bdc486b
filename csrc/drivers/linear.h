// y = x W^T with W of 4 or 8 bits in the compute layout of base/layout.h.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace awq {

struct TiledWeight {
  const uint8_t* codes;    // [T][S][16 bits]
  const uint16_t* scales;  // [T][G][32], bit patterns of scale_dtype
  const uint8_t* zeros;    // [T][G][4 bits]
  Dtype scale_dtype;       // f16 or bf16
  int64_t out_features;
  int64_t in_features;
  int64_t group_length;
  int bits;  // 4 or 8
};

enum class Compute { automatic, int8 };

// x [rows, K] of `dtype`, contiguous; y [rows, N] of the same dtype. input_scale fp32 [K] multiplies x first, bias fp32
// [N] is added in fp32; either may be null. Sums are fp32. fp32 and fp16 activations are not rounded; bf16 ones are
// rounded to bf16 again after input_scale where the level has products of bf16. Compute::int8 rounds all activations to
// eight bits, run by run (kernels.h).
void quant_linear(const KernelTable& table, const TiledWeight& weight, const void* x, Dtype dtype, int64_t rows,
                  const float* input_scale, const float* bias, Compute compute, void* y, int threads);

// W as fp32 [N, K]: (code - zero) * scale.
void quant_weight(const KernelTable& table, const TiledWeight& weight, float* out, int threads);

}  // namespace awq
