// The Python face of the drivers: checks, tensors to pointers, the GIL. awq_ext/reference.py says what each function
// computes.
#include "bindings.h"

#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <cmath>
#include <vector>

#include "adapters.h"
#include "checks.h"
#include "gptq.h"
#include "isa.h"
#include "layout.h"
#include "refine.h"
#include "search.h"
#include "tiles.h"

namespace awq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

py::tuple py_quantize_weight(const Tensor& weight, int64_t group_size, int64_t bits, bool symmetric,
                             at::ScalarType scale_dtype, const OptionalTensor& channel_scale,
                             const OptionalTensor& clip) {
  constexpr const char* kName = "quantize_weight";
  Tensor holder;
  const WeightView view = view_weight(kName, weight, holder);
  const int64_t n = view.out_features, k = view.in_features;
  const QuantSpec spec = make_spec(kName, k, group_size, bits, symmetric, scale_dtype);
  const int64_t groups = group_count(k, group_size);
  const Tensor s = float_argument(kName, "channel_scale", channel_scale, {k});
  const Tensor c = float_argument(kName, "clip", clip, {n, groups});
  const Tensor codes = at::empty({n, k}, at::kByte), scales = at::empty({n, groups}, scale_dtype),
               zeros = at::empty({n, groups}, at::kByte);
  {
    py::gil_scoped_release release;
    quantize_weight(kernels(), view, spec, float_data(s), float_data(c), codes.mutable_data_ptr<uint8_t>(),
                    static_cast<uint16_t*>(scales.mutable_data_ptr()), zeros.mutable_data_ptr<uint8_t>(),
                    at::get_num_threads());
  }
  return py::make_tuple(codes, scales, zeros);
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
  // the codes are read once, and again only to say what was wrong
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

// Sizes of both directions between rows and tiles.
struct TileSizes {
  int64_t n, k, length, steps;

  TileSizes(const char* name, int64_t out_features, int64_t in_features, int64_t group_size)
      : n(out_features), k(in_features) {
    AWQ_CHECK(n >= 0, name, "out_features", "a number of outputs", n);
    AWQ_CHECK(k > 0, name, "in_features", "a positive number", k);
    check_group_size(name, group_size);
    length = group_length(k, group_size);
    steps = step_count(k, length);
  }
};

Tensor empty_large(at::IntArrayRef shape) {
  const int64_t bytes = c10::multiply_integers(shape);
  void* data = allocate_large(bytes);
  return data == nullptr ? at::empty(shape, at::kByte) : at::from_blob(data, shape, free_large, at::kByte);
}

Tensor py_tile_int4(const Tensor& packed, int64_t in_features, int64_t group_size) {
  constexpr const char* kName = "tile_int4";
  const TileSizes sizes(kName, 0, in_features, group_size);
  check_shape(kName, "packed", packed, {-1, packed_bytes(in_features)});
  check_dtype(kName, "packed", packed, at::kByte);
  const Tensor p = packed.contiguous(), tiles = empty_large({tile_count(p.size(0)), sizes.steps, kStepBytes});
  py::gil_scoped_release release;
  tile_codes(p.const_data_ptr<uint8_t>(), p.size(0), sizes.k, sizes.length, tiles.mutable_data_ptr<uint8_t>(),
             at::get_num_threads());
  return tiles;
}

Tensor py_untile_int4(const Tensor& tiles, int64_t out_features, int64_t in_features, int64_t group_size) {
  constexpr const char* kName = "untile_int4";
  const TileSizes sizes(kName, out_features, in_features, group_size);
  check_shape(kName, "tiles", tiles, {tile_count(sizes.n), sizes.steps, kStepBytes});
  check_dtype(kName, "tiles", tiles, at::kByte);
  const Tensor t = tiles.contiguous(), packed = at::empty({sizes.n, packed_bytes(sizes.k)}, at::kByte);
  py::gil_scoped_release release;
  untile_codes(t.const_data_ptr<uint8_t>(), sizes.n, sizes.k, sizes.length, packed.mutable_data_ptr<uint8_t>(),
               at::get_num_threads());
  return packed;
}

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

// int64 [K], every channel once.
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

Tensor py_gptq_factor(const Tensor& second_moment, const Tensor& order, double damping,
                      const OptionalTensor& channel_scale) {
  constexpr const char* kName = "gptq_factor";
  const Tensor g = float_argument(kName, "second_moment", second_moment, {-1, -1});
  const int64_t k = g.size(0);
  AWQ_CHECK(k > 0 && g.size(1) == k, kName, "second_moment", "a square matrix", g.sizes());
  AWQ_CHECK(damping > 0.0 && std::isfinite(damping), kName, "damping", "a positive number", damping);
  AWQ_CHECK(g.isfinite().all().item<bool>(), kName, "second_moment", "finite numbers", "NaN or infinity");
  const Tensor o = order_argument(kName, order, k), s = float_argument(kName, "channel_scale", channel_scale, {k});
  const Tensor factor = at::empty({factor_rows(kernels(), k), k}, at::kFloat);
  py::gil_scoped_release release;
  gptq_factor(kernels(), float_data(g), k, o.const_data_ptr<int64_t>(), float_data(s), damping,
              factor.mutable_data_ptr<float>(), at::get_num_threads());
  return factor.narrow(0, 0, k);
}

py::tuple py_gptq_quantize(const Tensor& weight, const Tensor& factor, const Tensor& order, int64_t group_size,
                           int64_t bits, bool symmetric, at::ScalarType scale_dtype,
                           const OptionalTensor& channel_scale, const OptionalTensor& clip) {
  constexpr const char* kName = "gptq_quantize";
  Tensor holder;
  const WeightView view = view_weight(kName, weight, holder);
  const int64_t n = view.out_features, k = view.in_features;
  const QuantSpec spec = make_spec(kName, k, group_size, bits, symmetric, scale_dtype);
  const int64_t groups = group_count(k, group_size);
  const Tensor f = float_argument(kName, "factor", factor, {k, k}), o = order_argument(kName, order, k);
  const Tensor s = float_argument(kName, "channel_scale", channel_scale, {k});
  const Tensor c = float_argument(kName, "clip", clip, {n, groups});
  const Tensor codes = at::empty({n, k}, at::kByte), scales = at::empty({n, groups}, scale_dtype),
               zeros = at::empty({n, groups}, at::kByte);
  {
    py::gil_scoped_release release;
    gptq_quantize(kernels(), view, spec, float_data(s), float_data(c), float_data(f), o.const_data_ptr<int64_t>(),
                  codes.mutable_data_ptr<uint8_t>(), static_cast<uint16_t*>(scales.mutable_data_ptr()),
                  zeros.mutable_data_ptr<uint8_t>(), at::get_num_threads());
  }
  return py::make_tuple(codes, scales, zeros);
}

// Codes, scales and zeros that quantize_weight or gptq_quantize made of the same weight.
py::tuple py_refine_quantized(const Tensor& weight, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
                              const Tensor& second_moment, int64_t group_size, int64_t bits, double damping,
                              int64_t rounds, const OptionalTensor& channel_scale) {
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
    refine_quantized(kernels(), view, spec, float_data(s), float_data(g), damping, rounds, z.const_data_ptr<uint8_t>(),
                     c.mutable_data_ptr<uint8_t>(), static_cast<uint16_t*>(t.mutable_data_ptr()),
                     at::get_num_threads());
  }
  return py::make_tuple(c, t, z);
}

void bind_isa(py::module_& m) {
  m.def("isa", [] { return isa_name(current_isa()); }, "Name of the instruction set whose kernels run.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use the kernels of another instruction set, in the whole process. ValueError if this processor lacks it.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (Isa isa : available_isas()) names.emplace_back(isa_name(isa));
        return names;
      },
      "Names of the instruction sets that this build and this processor have, the least first.");
}

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
  m.def("tile_int4", &py_tile_int4, py::arg("packed"), py::arg("in_features"), py::arg("group_size"),
        "Packed rows uint8 [N, ceil(K / 2)] -> the tiles that int4_linear reads, uint8 [T, S, 64].");
  m.def("untile_int4", &py_untile_int4, py::arg("tiles"), py::arg("out_features"), py::arg("in_features"),
        py::arg("group_size"), "Inverse of tile_int4: uint8 [T, S, 64] -> uint8 [N, ceil(K / 2)].");
}

void bind_search(py::module_& m) {
  m.def("quadratic_loss", &py_quadratic_loss, py::arg("error"), py::arg("second_moment"),
        "e G e^T of every row: error fp32 [N, K], second_moment fp32 [K, K] -> fp64 [N]. Only what lies at and above "
        "the\n"
        "diagonal of second_moment is read: it must be symmetric.");
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

void bind_gptq(py::module_& m) {
  m.def("gptq_factor", &py_gptq_factor, py::arg("second_moment"), py::arg("order"), py::arg("damping") = 1.0,
        py::arg("channel_scale") = py::none(),
        "R fp32 [K, K], upper triangular, with R R^T = H + damping * diag(H) + 1e-6 * its mean, where H =\n"
        "diag(1/s) second_moment diag(1/s), both axes reordered by `order` int64 [K]. ValueError for numbers that are "
        "not "
        "finite.");
  m.def("gptq_quantize", &py_gptq_quantize, py::arg("weight"), py::arg("factor"), py::arg("order"),
        py::arg("group_size"), py::arg("bits") = 4, py::arg("symmetric") = false, py::arg("scale_dtype") = at::kHalf,
        py::arg("channel_scale") = py::none(), py::arg("clip") = py::none(),
        "quantize_weight with error feedback: channels are rounded in the given order, each making up for the errors\n"
        "of those before it. factor and order as gptq_factor takes and gives them.");
  m.def("refine_quantized", &py_refine_quantized, py::arg("weight"), py::arg("codes"), py::arg("scales"),
        py::arg("zeros"), py::arg("second_moment"), py::arg("group_size"), py::arg("bits") = 4,
        py::arg("damping") = 1.0, py::arg("rounds") = 1, py::arg("channel_scale") = py::none(),
        "Codes and scales that lower the output error further: in each round every scale, then every code, is set to\n"
        "its best value while all others stand. Zeros stay. H as in gptq_factor.");
}

// c10's errors carry the C++ stack; Python gets the sentence.
void translate_errors(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const c10::TypeError& e) {
    py::set_error(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::ValueError& e) {
    py::set_error(PyExc_ValueError, e.what_without_backtrace());
  }
}

}  // namespace
}  // namespace awq

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ kernels of awq_ext. The functions mirror awq_ext.reference, for tensors on the CPU.";
  py::register_local_exception_translator(&awq::translate_errors);
  awq::current_isa();  // an AWQ_EXT_ISA that cannot be had is an error at import, not in the middle of a run
  awq::bind_isa(m);
  awq::bind_quantize(m);
  awq::bind_search(m);
  awq::bind_gptq(m);
  awq::bind_stats(m);
}
