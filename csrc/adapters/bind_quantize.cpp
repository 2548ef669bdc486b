// Rounding to nearest, dequantizing, and packing of codes.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "adapters/adapters.h"
#include "adapters/bindings.h"
#include "adapters/checks.h"
#include "base/layout.h"
#include "drivers/quantize.h"
#include "kernels/isa.h"

namespace awq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

py::tuple py_quantize_weight(const Tensor& weight, int64_t group_size, int64_t bits, bool symmetric,
                             at::ScalarType scale_dtype, const OptionalTensor& channel_scale,
                             const OptionalTensor& clip) {
  constexpr const char* kName = "quantize_weight";
  const Rounding r(kName, weight, group_size, bits, symmetric, scale_dtype, channel_scale, clip);
  {
    py::gil_scoped_release release;
    quantize_weight(kernels(), r.weight, r.spec, float_data(r.channel_scale), float_data(r.clip), r.code_data(),
                    r.scale_data(), r.zero_data(), at::get_num_threads());
  }
  return py::make_tuple(r.codes, r.scales, r.zeros);
}

Tensor py_dequantize_weight(const Tensor& codes, const Tensor& scales, const Tensor& zeros, int64_t group_size) {
  constexpr const char* kName = "dequantize_weight";
  check_shape(kName, "codes", codes, {-1, -1});
  check_dtype(kName, "codes", codes, at::kByte);
  AWQ_CHECK(codes.numel() > 0, kName, "codes", "at least one row and one column", codes.sizes());
  check_group_size(kName, group_size);
  const int64_t n = codes.size(0), k = codes.size(1), groups = group_count(k, group_size);
  check_shape(kName, "scales", scales, {n, groups});
  check_shape(kName, "zeros", zeros, {n, groups});
  check_dtype(kName, "zeros", zeros, at::kByte);
  const Dtype scale_dtype = float_dtype(kName, "scales", scales.scalar_type());
  const Tensor c = codes.contiguous(), s = scales.contiguous(), z = zeros.contiguous();
  const Tensor out = at::empty({n, k}, at::kFloat);
  py::gil_scoped_release release;
  dequantize_weight(kernels(), c.const_data_ptr<uint8_t>(), s.const_data_ptr(), scale_dtype,
                    z.const_data_ptr<uint8_t>(), n, k, group_length(k, group_size), out.mutable_data_ptr<float>(),
                    at::get_num_threads());
  return out;
}

Tensor py_pack_int4(const Tensor& codes) {
  constexpr const char* kName = "pack_int4";
  check_shape(kName, "codes", codes, {-1, -1});
  check_dtype(kName, "codes", codes, at::kByte);
  const int64_t n = codes.size(0), k = codes.size(1);
  const Tensor c = codes.contiguous(), packed = at::empty({n, packed_bytes(k)}, at::kByte);
  if (c.numel() == 0) return packed;
  bool fit;
  {
    py::gil_scoped_release release;
    fit = pack_int4(kernels(), c.const_data_ptr<uint8_t>(), n, k, packed.mutable_data_ptr<uint8_t>(),
                    at::get_num_threads());
  }
  // codes are read a second time only to say what was wrong
  if (!fit) AWQ_CHECK(false, kName, "codes", "codes below 16", codes.max().item<int64_t>());
  return packed;
}

Tensor py_unpack_int4(const Tensor& packed, int64_t in_features) {
  constexpr const char* kName = "unpack_int4";
  AWQ_CHECK(in_features >= 0, kName, "in_features", "a number of channels", in_features);
  check_shape(kName, "packed", packed, {-1, packed_bytes(in_features)});
  check_dtype(kName, "packed", packed, at::kByte);
  const Tensor p = packed.contiguous(), codes = at::empty({p.size(0), in_features}, at::kByte);
  if (codes.numel() == 0) return codes;
  py::gil_scoped_release release;
  unpack_int4(kernels(), p.const_data_ptr<uint8_t>(), p.size(0), in_features, codes.mutable_data_ptr<uint8_t>(),
              at::get_num_threads());
  return codes;
}

}  // namespace

void bind_quantize(py::module_& m) {
  m.def("quantize_weight", &py_quantize_weight, py::arg("weight"), py::arg("group_size"), py::arg("bits") = 4,
        py::arg("symmetric") = false, py::arg("scale_dtype") = at::kHalf, py::arg("channel_scale") = py::none(),
        py::arg("clip") = py::none(),
        "Codes uint8 [N, K], scales scale_dtype [N, G] and zeros uint8 [N, G] of a weight [N, K] fp32/fp16/bf16.\n\n"
        "channel_scale fp32 [K] multiplies the columns first; clip fp32 [N, G] shrinks each group's range. Bit for bit "
        "the\n"
        "result of reference.quantize_weight. ValueError for a wrong shape or number, TypeError for a wrong dtype.");
  m.def("dequantize_weight", &py_dequantize_weight, py::arg("codes"), py::arg("scales"), py::arg("zeros"),
        py::arg("group_size"),
        "(code - zero) * scale: codes uint8 [N, K], scales [N, G], zeros uint8 [N, G] -> fp32 [N, K].");
  m.def("pack_int4", &py_pack_int4, py::arg("codes"),
        "uint8 [N, K] codes below 16 -> uint8 [N, ceil(K / 2)]: even channel in the low nibble, odd in the high one.");
  m.def("unpack_int4", &py_unpack_int4, py::arg("packed"), py::arg("in_features"),
        "Inverse of pack_int4: uint8 [N, ceil(K / 2)] -> uint8 [N, K].");
}

}  // namespace awq
