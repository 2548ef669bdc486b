// Codes that gradients move.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "adapters/adapters.h"
#include "adapters/bindings.h"
#include "adapters/checks.h"
#include "base/layout.h"
#include "drivers/learned.h"
#include "kernels/isa.h"

namespace awq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The checked arguments of a call, and contiguous copies where they were needed.
struct Argument {
  Tensor start, moved, scales, zeros, channel_scale, divisor;
  LearnedCodes view;

  Argument(const char* function, const Tensor& start_argument, const Tensor& moved_argument,
           const Tensor& scales_argument, const Tensor& zeros_argument, int64_t group_size, int64_t bits,
           const OptionalTensor& channel_scale_argument, const OptionalTensor& divisor_argument)
      : start(float_argument(function, "start", start_argument, {-1, -1})) {
    AWQ_CHECK(start.numel() > 0, function, "start", "at least one row and one column", start.sizes());
    check_group_size(function, group_size);
    AWQ_CHECK(1 <= bits && bits <= 8, function, "bits", "a number from 1 to 8", bits);
    const int64_t n = start.size(0), k = start.size(1), groups = group_count(k, group_size);
    moved = float_argument(function, "moved", moved_argument, {n, k});
    scales = float_argument(function, "scales", scales_argument, {n, groups});
    zeros = float_argument(function, "zeros", zeros_argument, {n, groups});
    channel_scale = float_argument(function, "channel_scale", channel_scale_argument, {k});
    divisor = float_argument(function, "divisor", divisor_argument, {n});
    view = {n,
            k,
            group_length(k, group_size),
            static_cast<int>(bits),
            float_data(start),
            float_data(moved),
            float_data(scales),
            float_data(zeros),
            float_data(channel_scale),
            float_data(divisor)};
  }
};

Tensor py_learned_weight(const Tensor& start, const Tensor& moved, const Tensor& scales, const Tensor& zeros,
                         int64_t group_size, int64_t bits, at::ScalarType dtype, const OptionalTensor& channel_scale,
                         const OptionalTensor& divisor) {
  constexpr const char* kName = "learned_weight";
  const Argument a(kName, start, moved, scales, zeros, group_size, bits, channel_scale, divisor);
  const Dtype type = float_dtype(kName, "dtype", dtype);
  const Tensor out = at::empty(start.sizes(), dtype);
  py::gil_scoped_release release;
  learned_weight(kernels(), a.view, type, out.mutable_data_ptr(), at::get_num_threads());
  return out;
}

// Tensors that change must be the caller's own.
float* changed(const char* argument, const Tensor& t) {
  AWQ_CHECK(t.is_contiguous(), "move_learned", argument, "a contiguous tensor", t.strides());
  return t.mutable_data_ptr<float>();
}

void py_move_learned(const Tensor& start, const Tensor& moved, const Tensor& thetas, const Tensor& scales,
                     const Tensor& zeros, const Tensor& gradient, double rate, double theta_rate, int64_t group_size,
                     int64_t bits, const OptionalTensor& channel_scale, const OptionalTensor& divisor) {
  constexpr const char* kName = "move_learned";
  const Argument a(kName, start, moved, scales, zeros, group_size, bits, channel_scale, divisor);
  float_argument(kName, "thetas", thetas, scales.sizes());
  check_shape(kName, "gradient", gradient, start.sizes());
  const Dtype type = float_dtype(kName, "gradient", gradient.scalar_type());
  const Tensor g = gradient.contiguous();
  float* const positions = changed("moved", moved);
  float* const sizes = changed("thetas", thetas);
  py::gil_scoped_release release;
  move_learned(kernels(), a.view, type, g.const_data_ptr(), static_cast<float>(rate), static_cast<float>(theta_rate),
               positions, sizes, at::get_num_threads());
}

}  // namespace

void bind_learned(py::module_& m) {
  m.def("learned_weight", &py_learned_weight, py::arg("start"), py::arg("moved"), py::arg("scales"), py::arg("zeros"),
        py::arg("group_size"), py::arg("bits"), py::arg("dtype"), py::arg("channel_scale") = py::none(),
        py::arg("divisor") = py::none(),
        "The weight of the codes nearest to start + moved, both fp32 [N, K] in codes: dtype [N, K].\n"
        "scales and zeros: fp32 [N, G]. It is divided by channel_scale fp32 [K] and multiplied by divisor fp32 [N].");
  m.def("move_learned", &py_move_learned, py::arg("start"), py::arg("moved"), py::arg("thetas"), py::arg("scales"),
        py::arg("zeros"), py::arg("gradient"), py::arg("rate"), py::arg("theta_rate"), py::arg("group_size"),
        py::arg("bits"), py::arg("channel_scale") = py::none(), py::arg("divisor") = py::none(),
        "Moves positions and thetas, in place, against the signs of their gradients. gradient [N, K]: that of what\n"
        "learned_weight returns for the same arguments. thetas fp32 [N, G]: logarithms of what scales are multiplied "
        "by.");
}

}  // namespace awq
