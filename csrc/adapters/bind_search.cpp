// Output errors, and the scales and clips that lower them.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "adapters/adapters.h"
#include "adapters/bindings.h"
#include "adapters/checks.h"
#include "base/layout.h"
#include "drivers/search.h"
#include "kernels/isa.h"

namespace awq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor py_quadratic_loss(const Tensor& error, const Tensor& second_moment) {
  constexpr const char* kName = "quadratic_loss";
  const Tensor e = float_argument(kName, "error", error, {-1, -1});
  const int64_t n = e.size(0), k = e.size(1);
  const Tensor g = float_argument(kName, "second_moment", second_moment, {k, k});
  const Tensor losses = at::zeros({n}, at::kDouble);
  if (e.numel() == 0) return losses;
  py::gil_scoped_release release;
  quadratic_loss(kernels(), float_data(e), n, k, float_data(g), losses.mutable_data_ptr<double>(),
                 at::get_num_threads());
  return losses;
}

py::tuple py_code_losses(const Tensor& weight, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
                         const Tensor& second_moment, int64_t group_size, const OptionalTensor& channel_scale,
                         const OptionalTensor& divisor, double damping, bool ranking) {
  constexpr const char* kName = "code_losses";
  check_shape(kName, "weight", weight, {-1, -1});
  check_group_size(kName, group_size);
  const int64_t n = weight.size(0), k = weight.size(1), groups = k == 0 ? 0 : group_count(k, group_size);
  const bool packed = codes.dim() == 2 && codes.size(1) != k;
  check_shape(kName, "codes", codes, {n, packed ? packed_bytes(k) : k});
  check_dtype(kName, "codes", codes, at::kByte);
  check_shape(kName, "scales", scales, {n, groups});
  check_shape(kName, "zeros", zeros, {n, groups});
  check_dtype(kName, "zeros", zeros, at::kByte);
  const Tensor g = float_argument(kName, "second_moment", second_moment, {k, k});
  const Tensor s = float_argument(kName, "channel_scale", channel_scale, {k});
  const Tensor d = float_argument(kName, "divisor", divisor, {n});
  AWQ_CHECK(damping >= 0.0 && std::isfinite(damping), kName, "damping", "a number from 0", damping);
  const Tensor plain = at::zeros({n}, at::kDouble), damped = damping == 0.0 ? plain : at::zeros({n}, at::kDouble);
  if (weight.numel() == 0) return py::make_tuple(plain, damped);
  Tensor holder;
  const WeightView view = view_weight(kName, weight, holder);
  const Tensor c = codes.contiguous(), t = scales.contiguous(), z = zeros.contiguous();
  const CodesView quantized{c.const_data_ptr<uint8_t>(), packed,
                            t.const_data_ptr(),          float_dtype(kName, "scales", t.scalar_type()),
                            z.const_data_ptr<uint8_t>(), group_length(k, group_size)};
  {
    py::gil_scoped_release release;
    code_losses(kernels(), view, quantized, float_data(s), float_data(d), float_data(g), damping, ranking,
                plain.mutable_data_ptr<double>(), damping == 0.0 ? nullptr : damped.mutable_data_ptr<double>(),
                at::get_num_threads());
  }
  return py::make_tuple(plain, damped);
}

Tensor py_scale_losses(const Tensor& weight, const Tensor& candidates, const Tensor& second_moment, int64_t group_size,
                       int64_t bits, bool symmetric, at::ScalarType scale_dtype, int64_t max_rows) {
  constexpr const char* kName = "scale_losses";
  Tensor holder;
  const WeightView view = view_weight(kName, weight, holder);
  const int64_t k = view.in_features;
  const QuantSpec spec = make_spec(kName, k, group_size, bits, symmetric, scale_dtype);
  const Tensor s = float_argument(kName, "candidates", candidates, {-1, k});
  const Tensor g = float_argument(kName, "second_moment", second_moment, {k, k});
  AWQ_CHECK(max_rows >= 0, kName, "max_rows", "0 (all) or a positive number", max_rows);
  const Tensor losses = at::zeros({s.size(0)}, at::kDouble);
  if (s.numel() == 0) return losses;
  py::gil_scoped_release release;
  scale_losses(kernels(), view, spec, float_data(s), s.size(0), float_data(g), max_rows,
               losses.mutable_data_ptr<double>(), at::get_num_threads());
  return losses;
}

Tensor py_search_clip(const Tensor& weight, const Tensor& second_moment, const Tensor& ratios, int64_t group_size,
                      int64_t bits, bool symmetric, at::ScalarType scale_dtype, const OptionalTensor& channel_scale) {
  constexpr const char* kName = "search_clip";
  Tensor holder;
  const WeightView view = view_weight(kName, weight, holder);
  const int64_t k = view.in_features;
  const QuantSpec spec = make_spec(kName, k, group_size, bits, symmetric, scale_dtype);
  const Tensor g = float_argument(kName, "second_moment", second_moment, {k, k});
  const Tensor r = float_argument(kName, "ratios", ratios, {-1});
  const Tensor s = float_argument(kName, "channel_scale", channel_scale, {k});
  const Tensor chosen = at::empty({view.out_features, group_count(k, group_size)}, at::kFloat);
  py::gil_scoped_release release;
  search_clip(kernels(), view, spec, float_data(s), float_data(g), float_data(r), r.size(0),
              chosen.mutable_data_ptr<float>(), at::get_num_threads());
  return chosen;
}

}  // namespace

void bind_search(py::module_& m) {
  m.def("quadratic_loss", &py_quadratic_loss, py::arg("error"), py::arg("second_moment"),
        "e G e^T of every row: error fp32 [N, K], second_moment fp32 [K, K] -> fp64 [N]. Only what lies at and above "
        "the\n"
        "diagonal of second_moment is read: it must be symmetric.");
  m.def(
      "code_losses", &py_code_losses, py::arg("weight"), py::arg("codes"), py::arg("scales"), py::arg("zeros"),
      py::arg("second_moment"), py::arg("group_size"), py::arg("channel_scale") = py::none(),
      py::arg("divisor") = py::none(), py::arg("damping") = 0.0, py::arg("ranking") = false,
      "Squared output errors of the rows of a quantized weight [N, K]: fp64 [N], and the same with the diagonal of\n"
      "second_moment raised by the share damping. codes uint8 [N, K], or packed two to a byte. Values are divided by\n"
      "channel_scale fp32 [K] and multiplied by divisor fp32 [N] before the weight is subtracted.\n\n"
      "ranking: only sums over rows will be compared; the products may then be in bf16.");
  m.def(
      "scale_losses", &py_scale_losses, py::arg("weight"), py::arg("candidates"), py::arg("second_moment"),
      py::arg("group_size"), py::arg("bits") = 4, py::arg("symmetric") = false, py::arg("scale_dtype") = at::kHalf,
      py::arg("max_rows") = 0,
      "Output error of a Linear for each candidate of its input scale: weight [N, K], candidates fp32 [C, K] > 0,\n"
      "second_moment fp32 [K, K] symmetric -> fp64 [C].\n\n"
      "0 < max_rows < N evaluates that many evenly spaced rows, to rank candidates: the products may then be in bf16.");
  m.def("search_clip", &py_search_clip, py::arg("weight"), py::arg("second_moment"), py::arg("ratios"),
        py::arg("group_size"), py::arg("bits") = 4, py::arg("symmetric") = false, py::arg("scale_dtype") = at::kHalf,
        py::arg("channel_scale") = py::none(),
        "The range ratio of each group with the least output error, the first of equals: weight [N, K],\n"
        "second_moment fp32 [K, K] symmetric, ratios fp32 [R] -> fp32 [N, G].");
}

}  // namespace awq
