// Registered operators: what runs inside forward, so that torch.compile, export and autograd see it. Other devices, the
// shape function and the gradient are registered in awq_ext/ops.py.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "isa.h"
#include "layout.h"
#include "linear.h"

namespace awq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kName = "int4_linear";

// Up to this many rows the packed codes are decoded on the way into fp32 sums; above, the weight is decoded once and
// torch's matrix product runs, which is faster in 16 bits and so takes over sooner. Eight is what one pass over the
// codes serves. tests/benchmarks/bench_kernels.py measures both sides.
constexpr int64_t direct_rows(Dtype dtype) { return dtype == Dtype::f32 ? 8 : 6; }
// Decoded weights held at a time: part of the cache, and pages that the allocator hands out again, where a whole matrix
// would be fresh zero pages from the system at every call, which cost ten times the decoding.
constexpr int64_t kDecodedBytes = 4 << 20;

struct Int4Tensors {
  Tensor qweight, scales, zeros;
  Int4Weight view;
};

Int4Tensors view_int4(const Tensor& qweight, const Tensor& scales, const Tensor& zeros, int64_t k, int64_t group_size) {
  check_group_size(kName, group_size);
  check_shape(kName, "qweight", qweight, {-1, packed_bytes(k)});
  check_dtype(kName, "qweight", qweight, at::kByte);
  const int64_t n = qweight.size(0), groups = group_count(k, group_size);
  check_shape(kName, "scales", scales, {n, groups});
  check_shape(kName, "zeros", zeros, {n, groups});
  check_dtype(kName, "zeros", zeros, at::kByte);
  const Dtype scale_dtype = float_dtype(kName, "scales", scales.scalar_type());
  Int4Tensors t{qweight.contiguous(), scales.contiguous(), zeros.contiguous(), {}};
  t.view = {t.qweight.const_data_ptr<uint8_t>(),
            t.scales.const_data_ptr(),
            scale_dtype,
            t.zeros.const_data_ptr<uint8_t>(),
            n,
            k,
            group_length(k, group_size)};
  return t;
}

// For many rows: a slice of output channels at a time is decoded to x's dtype and multiplied by torch.
Tensor linear_by_slices(const Tensor& x, const Int4Weight& weight, Dtype dtype, const OptionalTensor& bias) {
  const int64_t n = weight.out_features, k = weight.in_features;
  const int64_t slice = std::clamp<int64_t>(kDecodedBytes / (k * x.element_size()), std::min<int64_t>(n, 64), n);
  const Tensor w = at::empty({slice, k}, x.options()), y = at::empty({x.size(0), n}, x.options());
  const Tensor b = bias.has_value() ? bias->to(x.scalar_type()) : Tensor();
  for (int64_t first = 0; first < n; first += slice) {
    const int64_t count = std::min(slice, n - first);
    dequantize_int4(kernels(), weight, first, count, dtype, w.mutable_data_ptr(), at::get_num_threads());
    const OptionalTensor part = b.defined() ? OptionalTensor(b.narrow(0, first, count)) : std::nullopt;
    y.narrow(1, first, count).copy_(at::linear(x, w.narrow(0, 0, count), part));
  }
  return y;
}

Tensor int4_linear_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales, const Tensor& zeros,
                       const OptionalTensor& bias, const OptionalTensor& pre_quant_scale, int64_t group_size) {
  AWQ_CHECK(x.dim() >= 1 && x.size(-1) > 0, kName, "x", "shape [..., in_features]", x.sizes());
  const Dtype dtype = float_dtype(kName, "x", x.scalar_type());
  const int64_t k = x.size(-1);
  const Int4Tensors weight = view_int4(qweight, scales, zeros, k, group_size);
  const int64_t n = weight.view.out_features;
  if (bias.has_value()) check_shape(kName, "bias", *bias, {n});
  if (pre_quant_scale.has_value()) check_shape(kName, "pre_quant_scale", *pre_quant_scale, {k});

  at::DimVector out_shape(x.sizes().begin(), x.sizes().end());
  out_shape.back() = n;
  if (x.numel() == 0 || n == 0) return at::empty(out_shape, x.options());
  const int64_t rows = x.numel() / k;
  const bool direct = rows <= direct_rows(dtype) && groups_are_whole_bytes(weight.view);
  Tensor input = x.reshape({rows, k});
  if (direct || pre_quant_scale.has_value()) input = input.to(at::kFloat);
  if (pre_quant_scale.has_value()) input = input * pre_quant_scale->to(at::kFloat);
  if (!direct) return linear_by_slices(input.to(x.scalar_type()), weight.view, dtype, bias).reshape(out_shape);
  input = input.contiguous();
  const Tensor b = bias.has_value() ? bias->to(at::kFloat).contiguous() : Tensor();
  const Tensor y = at::empty({rows, n}, at::kFloat);
  int4_linear_rows(kernels(), weight.view, input.const_data_ptr<float>(), rows,
                   b.defined() ? b.const_data_ptr<float>() : nullptr, y.mutable_data_ptr<float>(),
                   at::get_num_threads());
  return y.to(x.scalar_type()).reshape(out_shape);
}

}  // namespace
}  // namespace awq

TORCH_LIBRARY(awq_ext, m) {
  m.def(
      "int4_linear(Tensor x, Tensor qweight, Tensor scales, Tensor zeros, Tensor? bias, Tensor? pre_quant_scale, "
      "int group_size) -> Tensor");
}

TORCH_LIBRARY_IMPL(awq_ext, CPU, m) { m.impl("int4_linear", &awq::int4_linear_cpu); }
