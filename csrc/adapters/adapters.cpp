#include "adapters/adapters.h"

#include <ATen/ops/empty.h>

#include "adapters/checks.h"
#include "base/layout.h"

namespace awq {

WeightView view_weight(const char* function, const at::Tensor& weight, at::Tensor& holder) {
  check_shape(function, "weight", weight, {-1, -1});
  const Dtype dtype = float_dtype(function, "weight", weight.scalar_type());
  AWQ_CHECK(weight.numel() > 0, function, "weight", "at least one row and one column", weight.sizes());
  holder = weight.contiguous();
  return {holder.const_data_ptr(), dtype, holder.size(0), holder.size(1)};
}

QuantSpec make_spec(const char* function, int64_t in_features, int64_t group_size, int64_t bits, bool symmetric,
                    at::ScalarType scale_dtype) {
  check_group_size(function, group_size);
  AWQ_CHECK(2 <= bits && bits <= 8, function, "bits", "a number from 2 to 8", bits);
  AWQ_CHECK_TYPE(scale_dtype == at::kHalf || scale_dtype == at::kBFloat16, function, "scale_dtype",
                 "float16 or bfloat16", c10::toString(scale_dtype));
  return {group_length(in_features, group_size), static_cast<int>(bits), symmetric,
          scale_dtype == at::kHalf ? Dtype::f16 : Dtype::bf16};
}

at::Tensor float_argument(const char* function, const char* argument, const at::Tensor& t, at::IntArrayRef shape) {
  check_shape(function, argument, t, shape);
  check_dtype(function, argument, t, at::kFloat);
  return t.contiguous();
}

at::Tensor float_argument(const char* function, const char* argument, const std::optional<at::Tensor>& t,
                          at::IntArrayRef shape) {
  return t.has_value() ? float_argument(function, argument, *t, shape) : at::Tensor();
}

Rounding::Rounding(const char* function, const at::Tensor& weight_argument, int64_t group_size, int64_t bits,
                   bool symmetric, at::ScalarType scale_dtype, const std::optional<at::Tensor>& channel_scale_argument,
                   const std::optional<at::Tensor>& clip_argument)
    : weight(view_weight(function, weight_argument, holder)),
      spec(make_spec(function, weight.in_features, group_size, bits, symmetric, scale_dtype)) {
  const int64_t n = weight.out_features, k = weight.in_features, groups = group_count(k, group_size);
  channel_scale = float_argument(function, "channel_scale", channel_scale_argument, {k});
  clip = float_argument(function, "clip", clip_argument, {n, groups});
  codes = at::empty({n, k}, at::kByte);
  scales = at::empty({n, groups}, scale_dtype);
  zeros = at::empty({n, groups}, at::kByte);
}

const float* float_data(const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

}  // namespace awq
