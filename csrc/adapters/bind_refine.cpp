// Refining of scales and codes after rounding.
#include <ATen/Parallel.h>

#include <cmath>

#include "adapters/adapters.h"
#include "adapters/bindings.h"
#include "adapters/checks.h"
#include "base/layout.h"
#include "drivers/refine.h"
#include "kernels/isa.h"

namespace awq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// codes, scales and zeros: what quantize_weight or gptq_quantize returned for the same weight.
py::tuple py_refine_quantized(const Tensor& weight, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
                              const Tensor& second_moment, int64_t group_size, int64_t bits, double damping,
                              int64_t rounds, const OptionalTensor& channel_scale, bool scales_only) {
  constexpr const char* kName = "refine_quantized";
  Tensor holder;
  const WeightView view = view_weight(kName, weight, holder);
  const int64_t n = view.out_features, k = view.in_features, groups = group_count(k, group_size);
  const QuantSpec spec = make_spec(kName, k, group_size, bits, false, scales.scalar_type());
  check_shape(kName, "codes", codes, {n, k});
  check_dtype(kName, "codes", codes, at::kByte);
  check_shape(kName, "scales", scales, {n, groups});
  check_shape(kName, "zeros", zeros, {n, groups});
  check_dtype(kName, "zeros", zeros, at::kByte);
  const Tensor g = float_argument(kName, "second_moment", second_moment, {k, k});
  const Tensor s = float_argument(kName, "channel_scale", channel_scale, {k});
  AWQ_CHECK(damping >= 0.0 && std::isfinite(damping), kName, "damping", "a number from 0", damping);
  AWQ_CHECK(rounds >= 0, kName, "rounds", "a count", rounds);
  const Tensor c = codes.clone(at::MemoryFormat::Contiguous), t = scales.clone(at::MemoryFormat::Contiguous),
               z = zeros.contiguous();
  {
    py::gil_scoped_release release;
    uint16_t* const steps = static_cast<uint16_t*>(t.mutable_data_ptr());
    if (scales_only)
      refine_scales(kernels(), view, spec, float_data(s), float_data(g), damping, rounds, z.const_data_ptr<uint8_t>(),
                    c.const_data_ptr<uint8_t>(), steps, at::get_num_threads());
    else
      refine_quantized(kernels(), view, spec, float_data(s), float_data(g), damping, rounds,
                       z.const_data_ptr<uint8_t>(), c.mutable_data_ptr<uint8_t>(), steps, at::get_num_threads());
  }
  return py::make_tuple(c, t, z);
}

}  // namespace

void bind_refine(py::module_& m) {
  m.def("refine_quantized", &py_refine_quantized, py::arg("weight"), py::arg("codes"), py::arg("scales"),
        py::arg("zeros"), py::arg("second_moment"), py::arg("group_size"), py::arg("bits") = 4,
        py::arg("damping") = 1.0, py::arg("rounds") = 1, py::arg("channel_scale") = py::none(),
        py::arg("scales_only") = false,
        "Codes and scales that lower the output error further: in each round every scale, then every code (unless\n"
        "scales_only), is set to its best value while all others stand. Zeros stay. H = diag(1/s) "
        "second_moment diag(1/s), its\ndiagonal raised by the share damping.");
}

}  // namespace awq
