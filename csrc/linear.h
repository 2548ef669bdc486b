// y = x W^T with four-bit W, in the layout of layout.h. The layout is for simplicity; panels made for the widest
// instructions are a matter of a later kernel behind the same operator.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace awq {

struct Int4Weight {
  const uint8_t* packed;  // [N, ceil(K / 2)]
  const void* scales;     // [N, G]
  Dtype scale_dtype;
  const uint8_t* zeros;  // [N, G]
  int64_t out_features;
  int64_t in_features;
  int64_t group_length;
};

// True if int4_linear_rows can run: groups must begin at whole bytes.
bool groups_are_whole_bytes(const Int4Weight& weight);

// x fp32 [rows, K] -> y fp32 [rows, N], straight from the packed codes. bias fp32 [N] or null. Meant for few rows: the
// codes are decoded once for every eight.
void int4_linear_rows(const KernelTable& table, const Int4Weight& weight, const float* x, int64_t rows,
                      const float* bias, float* y, int threads);

// Rows first .. first + count of W in `dtype`, [count, K]: (code - zero) * scale in fp32, rounded once.
void dequantize_int4(const KernelTable& table, const Int4Weight& weight, int64_t first, int64_t count, Dtype dtype,
                     void* out, int threads);

}  // namespace awq
