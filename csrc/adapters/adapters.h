// From tensors to the drivers' views of them: checks, contiguous copies where needed, pointers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "drivers/quantize.h"

namespace awq {

// A weight [N, K] of a float dtype; `holder` keeps the contiguous copy, if one was needed, alive.
WeightView view_weight(const char* function, const at::Tensor& weight, at::Tensor& holder);
QuantSpec make_spec(const char* function, int64_t in_features, int64_t group_size, int64_t bits, bool symmetric,
                    at::ScalarType scale_dtype);
// The argument as a contiguous fp32 tensor of that shape; undefined if it is absent.
at::Tensor float_argument(const char* function, const char* argument, const at::Tensor& t, at::IntArrayRef shape);
at::Tensor float_argument(const char* function, const char* argument, const std::optional<at::Tensor>& t,
                          at::IntArrayRef shape);
// The checked arguments of rounding a weight, and the empty results to fill.
struct Rounding {
  at::Tensor holder;
  WeightView weight;
  QuantSpec spec;
  at::Tensor channel_scale, clip;   // fp32 [K], [N, G]; undefined if absent
  at::Tensor codes, scales, zeros;  // uint8 [N, K], scale_dtype [N, G], uint8 [N, G]

  Rounding(const char* function, const at::Tensor& weight, int64_t group_size, int64_t bits, bool symmetric,
           at::ScalarType scale_dtype, const std::optional<at::Tensor>& channel_scale,
           const std::optional<at::Tensor>& clip);
  uint8_t* code_data() const { return codes.mutable_data_ptr<uint8_t>(); }
  uint16_t* scale_data() const { return static_cast<uint16_t*>(scales.mutable_data_ptr()); }
  uint8_t* zero_data() const { return zeros.mutable_data_ptr<uint8_t>(); }
};
// Null for an undefined tensor.
const float* float_data(const at::Tensor& t);

}  // namespace awq
