// Between tensors and the drivers' views of them: checks, contiguous copies where needed, pointers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "quantize.h"

namespace awq {

// A weight [N, K] of a float dtype; `holder` keeps the contiguous copy, if one was needed, alive.
WeightView view_weight(const char* function, const at::Tensor& weight, at::Tensor& holder);
QuantSpec make_spec(const char* function, int64_t in_features, int64_t group_size, int64_t bits, bool symmetric,
                    at::ScalarType scale_dtype);
// fp32 of that shape, contiguous. Undefined if the argument is absent.
at::Tensor float_argument(const char* function, const char* argument, const at::Tensor& t, at::IntArrayRef shape);
at::Tensor float_argument(const char* function, const char* argument, const std::optional<at::Tensor>& t,
                          at::IntArrayRef shape);
// Null for an undefined tensor.
const float* float_data(const at::Tensor& t);

}  // namespace awq
