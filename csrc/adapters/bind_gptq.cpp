// Rounding with error feedback.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <vector>

#include "adapters/adapters.h"
#include "adapters/bindings.h"
#include "adapters/checks.h"
#include "drivers/gptq.h"
#include "kernels/isa.h"

namespace awq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Checks for int64 [K] that names every channel once.
Tensor order_argument(const char* function, const Tensor& order, int64_t in_features) {
  check_shape(function, "order", order, {in_features});
  check_dtype(function, "order", order, at::kLong);
  const Tensor o = order.contiguous();
  std::vector<bool> seen(static_cast<size_t>(in_features));
  for (int64_t i = 0; i < in_features; ++i) {
    const int64_t channel = o.const_data_ptr<int64_t>()[i];
    AWQ_CHECK(channel >= 0 && channel < in_features && !seen[static_cast<size_t>(channel)], function, "order",
              "every channel once", channel);
    seen[static_cast<size_t>(channel)] = true;
  }
  return o;
}

Tensor py_gptq_factor(const Tensor& second_moment, const Tensor& order, double damping) {
  constexpr const char* kName = "gptq_factor";
  const Tensor g = float_argument(kName, "second_moment", second_moment, {-1, -1});
  const int64_t k = g.size(0);
  AWQ_CHECK(k > 0 && g.size(1) == k, kName, "second_moment", "a square matrix", g.sizes());
  AWQ_CHECK(damping > 0.0 && std::isfinite(damping), kName, "damping", "a positive number", damping);
  AWQ_CHECK(g.isfinite().all().item<bool>(), kName, "second_moment", "finite numbers", "NaN or infinity");
  const Tensor o = order_argument(kName, order, k);
  const Tensor factor = at::empty({factor_rows(kernels(), k), k}, at::kFloat);
  py::gil_scoped_release release;
  gptq_factor(kernels(), float_data(g), k, o.const_data_ptr<int64_t>(), damping, factor.mutable_data_ptr<float>(),
              at::get_num_threads());
  return factor.narrow(0, 0, k);
}

py::tuple py_gptq_quantize(const Tensor& weight, const Tensor& factor, const Tensor& order, int64_t group_size,
                           int64_t bits, bool symmetric, at::ScalarType scale_dtype,
                           const OptionalTensor& channel_scale, const OptionalTensor& clip) {
  constexpr const char* kName = "gptq_quantize";
  const Rounding r(kName, weight, group_size, bits, symmetric, scale_dtype, channel_scale, clip);
  const int64_t k = r.weight.in_features;
  const Tensor f = float_argument(kName, "factor", factor, {k, k}), o = order_argument(kName, order, k);
  {
    py::gil_scoped_release release;
    gptq_quantize(kernels(), r.weight, r.spec, float_data(r.channel_scale), float_data(r.clip), float_data(f),
                  o.const_data_ptr<int64_t>(), r.code_data(), r.scale_data(), r.zero_data(), at::get_num_threads());
  }
  return py::make_tuple(r.codes, r.scales, r.zeros);
}

}  // namespace

void bind_gptq(py::module_& m) {
  m.def("gptq_factor", &py_gptq_factor, py::arg("second_moment"), py::arg("order"), py::arg("damping") = 1.0,
        "R fp32 [K, K], upper triangular, with R R^T = H + damping * diag(H) + 1e-6 * its mean, where H is the second\n"
        "moment, both axes reordered by `order` int64 [K]. ValueError for numbers that are not finite.");
  m.def("gptq_quantize", &py_gptq_quantize, py::arg("weight"), py::arg("factor"), py::arg("order"),
        py::arg("group_size"), py::arg("bits") = 4, py::arg("symmetric") = false, py::arg("scale_dtype") = at::kHalf,
        py::arg("channel_scale") = py::none(), py::arg("clip") = py::none(),
        "quantize_weight with error feedback: channels are rounded in the given order, each making up for the errors\n"
        "of those before it. factor and order as gptq_factor takes and gives them, whatever the channel_scale.");
}

}  // namespace awq
