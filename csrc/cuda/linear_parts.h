// Layers with few outputs and not many rows have fewer blocks than a GPU has multiprocessors. There several blocks take
// parts of the channels and write fp32 sums [parts][rows][n] into memory that the caller provides; these are added up
// in the order of the parts, so the result does not depend on what runs when.
#pragma once

#include "cuda/linear_small.h"

namespace awq::cuda {

// Stages of channels below which a part is not worth its sums, which are written and read once more.
constexpr int64_t kLeastStages = 4, kMostParts = 16;

// Into how many parts the stages are divided where all of them in one would give so many blocks.
inline int64_t parts_of(int64_t blocks, int64_t stages) {
  if (blocks == 0) return 1;
  int64_t parts = multiprocessors() / blocks;
  if (parts > stages / kLeastStages) parts = stages / kLeastStages;
  if (parts > kMostParts) parts = kMostParts;
  return parts > 1 ? ceil_div(stages, ceil_div(stages, parts)) : 1;  // none is empty
}

template <Type kType>
__global__ void __launch_bounds__(256) add_parts(LinearRows rows, const float* parts, int64_t count, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, size = rows.rows * n;
  if (i >= size) return;
  float sum = parts[i];
  for (int64_t part = 1; part < count; ++part) sum += parts[part * size + i];
  store(rows.y, kType, i, sum + bias_at(rows, i % n));
}

inline int64_t launch_add_parts(void* stream, int64_t n, const LinearRows& rows, const float* parts, int64_t count,
                                Type type) {
  return launch(stream, {ceil_div(rows.rows * n, 256)}, 256, 0,
                type == Type::f16 ? add_parts<Type::f16> : add_parts<Type::bf16>, rows, parts, count, n);
}

}  // namespace awq::cuda
