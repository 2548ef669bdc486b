// Operators that run inside forward, registered so that torch.compile, export, autocast and autograd see them. Other
// devices, what is unusual on a GPU, and the shape functions are registered in awq_ext/layers/ops.py.
//
// Autograd is registered here and not in Python because calling a Python autograd function takes longer than computing
// a small layer.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "adapters/adapters.h"
#include "adapters/checks.h"
#include "adapters/cuda_linear.h"
#include "base/layout.h"
#include "drivers/linear.h"
#include "drivers/scale_gradient.h"
#include "kernels/isa.h"

namespace awq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kLinear = "quant_linear";
constexpr const char* kWeight = "quant_weight";
constexpr const char* kScaleGradient = "quant_scale_gradient";

struct TiledTensors {
  Tensor tiles, scales, zeros;
  TiledWeight view;
};

TiledTensors view_tiles(const char* name, const Tensor& tiles, const Tensor& scales, const Tensor& zeros, int64_t k,
                        int64_t n, int64_t group_size, int64_t bits) {
  check_group_size(name, group_size);
  const int width = tile_bits(name, bits);
  AWQ_CHECK(k > 0, name, "in_features", "a positive number", k);
  AWQ_CHECK(n >= 0, name, "out_features", "a number of outputs", n);
  const int64_t length = group_length(k, group_size), groups = group_count(k, group_size), count = tile_count(n);
  check_shape(name, "tiles", tiles, {count, step_count(k, length), step_bytes(width)});
  check_dtype(name, "tiles", tiles, at::kByte);
  check_shape(name, "scales", scales, {count, groups, kTileOutputs});
  check_shape(name, "zeros", zeros, {count, groups, tile_zero_bytes(width)});
  check_dtype(name, "zeros", zeros, at::kByte);
  const Dtype scale_dtype = float_dtype(name, "scales", scales.scalar_type());
  AWQ_CHECK_TYPE(scale_dtype != Dtype::f32, name, "scales", "float16 or bfloat16", "Float");
  TiledTensors t{tiles.contiguous(), scales.contiguous(), zeros.contiguous(), {}};
  t.view = {t.tiles.const_data_ptr<uint8_t>(),
            static_cast<const uint16_t*>(t.scales.const_data_ptr()),
            t.zeros.const_data_ptr<uint8_t>(),
            scale_dtype,
            n,
            k,
            length,
            width};
  return t;
}

// The argument as fp32 of that length on the CPU; undefined if absent. It is converted: a bias has its model's dtype.
Tensor float_vector(const char* name, const char* argument, const OptionalTensor& t, int64_t length) {
  if (!t.has_value()) return {};
  check_shape(name, argument, *t, {length});
  return t->to(at::kFloat).contiguous();
}

Tensor quant_linear_cpu(const Tensor& x, const Tensor& tiles, const Tensor& scales, const Tensor& zeros,
                        const OptionalTensor& bias, const OptionalTensor& pre_quant_scale, int64_t in_features,
                        int64_t out_features, int64_t group_size, int64_t bits, std::string_view compute_dtype) {
  const Dtype dtype = float_dtype(kLinear, "x", x.scalar_type());
  AWQ_CHECK(x.dim() >= 1 && x.size(-1) == in_features, kLinear, "x", "shape [..., " + std::to_string(in_features) + "]",
            x.sizes());
  const TiledTensors w = view_tiles(kLinear, tiles, scales, zeros, in_features, out_features, group_size, bits);
  const bool int8 = compute_dtype == "int8";
  AWQ_CHECK(int8 || compute_dtype == "auto", kLinear, "compute_dtype", "'auto' or 'int8'", compute_dtype);
  const Compute compute = int8 ? Compute::int8 : Compute::automatic;
  const Tensor b = float_vector(kLinear, "bias", bias, out_features);
  const Tensor s = float_vector(kLinear, "pre_quant_scale", pre_quant_scale, in_features);
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  const Tensor input = x.contiguous(), y = at::empty(shape, input.options());
  if (y.numel() == 0) return y;
  quant_linear(kernels(), w.view, input.const_data_ptr(), dtype, x.numel() / in_features, float_data(s), float_data(b),
               compute, y.mutable_data_ptr(), at::get_num_threads());
  return y;
}

Tensor quant_weight_cpu(const Tensor& tiles, const Tensor& scales, const Tensor& zeros, int64_t in_features,
                        int64_t out_features, int64_t group_size, int64_t bits) {
  const TiledTensors w = view_tiles(kWeight, tiles, scales, zeros, in_features, out_features, group_size, bits);
  const Tensor out = at::empty({out_features, in_features}, at::kFloat);
  if (out.numel() > 0) quant_weight(kernels(), w.view, out.mutable_data_ptr<float>(), at::get_num_threads());
  return out;
}

Tensor quant_scale_gradient_cpu(const Tensor& gradient, const Tensor& x, const Tensor& tiles, const Tensor& scales,
                                const Tensor& zeros, const OptionalTensor& pre_quant_scale, int64_t in_features,
                                int64_t out_features, int64_t group_size, int64_t bits) {
  constexpr const char* kName = kScaleGradient;
  const Dtype dtype = float_dtype(kName, "x", x.scalar_type());
  AWQ_CHECK(x.dim() >= 1 && x.size(-1) == in_features, kName, "x", "shape [..., " + std::to_string(in_features) + "]",
            x.sizes());
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  check_shape(kName, "gradient", gradient, shape);
  check_dtype(kName, "gradient", gradient, x.scalar_type());
  const TiledTensors w = view_tiles(kName, tiles, scales, zeros, in_features, out_features, group_size, bits);
  const Tensor s = float_vector(kName, "pre_quant_scale", pre_quant_scale, in_features);
  const Tensor input = x.contiguous(), g = gradient.contiguous();
  const Tensor out = at::empty({out_features, group_count(in_features, group_size)}, at::kFloat);
  if (out.numel() > 0)
    scale_gradient(kernels(), w.view, g.const_data_ptr(), input.const_data_ptr(), dtype, input.numel() / in_features,
                   float_data(s), out.mutable_data_ptr<float>(), at::get_num_threads());
  return out;
}

Tensor call_linear(const Tensor& x, const Tensor& tiles, const Tensor& scales, const Tensor& zeros,
                   const OptionalTensor& bias, const OptionalTensor& pre_quant_scale, int64_t in_features,
                   int64_t out_features, int64_t group_size, int64_t bits, std::string_view compute_dtype) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("awq_ext::quant_linear", "").typed<decltype(quant_linear_cpu)>();
  return op.call(x, tiles, scales, zeros, bias, pre_quant_scale, in_features, out_features, group_size, bits,
                 compute_dtype);
}

Tensor call_weight(const Tensor& tiles, const Tensor& scales, const Tensor& zeros, int64_t in_features,
                   int64_t out_features, int64_t group_size, int64_t bits) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("awq_ext::quant_weight", "").typed<decltype(quant_weight_cpu)>();
  return op.call(tiles, scales, zeros, in_features, out_features, group_size, bits);
}

Tensor call_scale_gradient(const Tensor& gradient, const Tensor& x, const Tensor& tiles, const Tensor& scales,
                           const Tensor& zeros, const OptionalTensor& pre_quant_scale,
                           const std::vector<int64_t>& sizes) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("awq_ext::quant_scale_gradient", "")
                             .typed<decltype(quant_scale_gradient_cpu)>();
  return op.call(gradient, x, tiles, scales, zeros, pre_quant_scale, sizes[0], sizes[1], sizes[2], sizes[3]);
}

// Rows [N, G] in the layout of scales, [T, G, 32]; the outputs that fill up the last tile get 0.
Tensor in_tiles(const Tensor& rows) {
  const int64_t n = rows.size(0), count = tile_count(n);
  const Tensor padded = at::constant_pad_nd(rows, {0, 0, 0, count * kTileOutputs - n});
  return padded.view({count, kTileOutputs, rows.size(1)}).transpose(1, 2).contiguous();
}

// Gradients reach x, through the dequantized weight in the gradient's dtype, the bias, and the scales of the weight's
// groups. Rounding activations to int8 is differentiated as the identity.
struct LinearFunction : torch::autograd::Function<LinearFunction> {
  using Context = torch::autograd::AutogradContext;
  using List = torch::autograd::variable_list;

  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& tiles, const Tensor& scales, const Tensor& zeros,
                        const OptionalTensor& bias, const OptionalTensor& pre_quant_scale, int64_t in_features,
                        int64_t out_features, int64_t group_size, int64_t bits, std::string_view compute_dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    // x is kept only where the scales ask for their gradient
    ctx->save_for_backward(
        {tiles, scales, zeros, pre_quant_scale.value_or(Tensor()), scales.requires_grad() ? x : Tensor()});
    ctx->saved_data["sizes"] = std::vector<int64_t>{in_features, out_features, group_size, bits};
    if (bias.has_value()) ctx->saved_data["bias"] = static_cast<int64_t>(bias->scalar_type());
    return call_linear(x, tiles, scales, zeros, bias, pre_quant_scale, in_features, out_features, group_size, bits,
                       compute_dtype);
  }

  static List backward(Context* ctx, const List& gradients) {
    const Tensor& grad = gradients[0];
    const List saved = ctx->get_saved_variables();
    const auto sizes = ctx->saved_data["sizes"].toIntVector();
    Tensor to_x, to_scales, to_bias;
    if (ctx->needs_input_grad(0)) {
      const Tensor weight = call_weight(saved[0], saved[1], saved[2], sizes[0], sizes[1], sizes[2], sizes[3]);
      to_x = grad.matmul(weight.to(grad.scalar_type()));
      if (saved[3].defined()) to_x = (to_x.to(at::kFloat) * saved[3]).to(grad.scalar_type());
    }
    if (ctx->saved_data.count("bias") != 0 && ctx->needs_input_grad(4)) {
      const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["bias"].toInt());
      const Tensor wide = grad.to(at::kFloat);
      to_bias = (grad.dim() > 1 ? wide.flatten(0, -2).sum(0) : wide).to(dtype);
    }
    if (ctx->needs_input_grad(2)) {
      const OptionalTensor s = saved[3].defined() ? OptionalTensor(saved[3]) : std::nullopt;
      const Tensor rows = call_scale_gradient(grad.contiguous(), saved[4], saved[0], saved[1], saved[2], s, sizes);
      to_scales = in_tiles(rows).to(saved[1].scalar_type());
    }
    return {to_x, {}, to_scales, {}, to_bias, {}, {}, {}, {}, {}, {}};
  }
};

// The same layer made of torch's own operators, whose derivatives are known to every transform.
Tensor linear_of_operators(const Tensor& x, const Tensor& tiles, const Tensor& scales, const Tensor& zeros,
                           const OptionalTensor& bias, const OptionalTensor& pre_quant_scale, int64_t in_features,
                           int64_t out_features, int64_t group_size, int64_t bits) {
  const Tensor weight = call_weight(tiles, scales, zeros, in_features, out_features, group_size, bits);
  const Tensor wide = x.to(at::kFloat), input = pre_quant_scale.has_value() ? wide * *pre_quant_scale : wide;
  const OptionalTensor b = bias.has_value() ? OptionalTensor(bias->to(at::kFloat)) : std::nullopt;
  return at::linear(input, weight, b).to(x.scalar_type());
}

bool has_tangent(const Tensor& t) { return t._fw_grad(0).defined(); }

// Whether torch.func or forward-mode differentiation runs: they know no derivative of a C++ autograd function, and
// below autograd a tangent would be lost without a word.
bool is_transformed(const Tensor& x, const OptionalTensor& bias, bool trained) {
  if (has_tangent(x) || (bias.has_value() && has_tangent(*bias))) return true;
  return trained && c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

Tensor quant_linear_autograd(const Tensor& x, const Tensor& tiles, const Tensor& scales, const Tensor& zeros,
                             const OptionalTensor& bias, const OptionalTensor& pre_quant_scale, int64_t in_features,
                             int64_t out_features, int64_t group_size, int64_t bits, std::string_view compute_dtype) {
  const bool scaled = scales.requires_grad() || has_tangent(scales);
  const bool trained = x.requires_grad() || scaled || (bias.has_value() && bias->requires_grad());
  if (!scaled && is_transformed(x, bias, trained && at::GradMode::is_enabled()))
    return linear_of_operators(x, tiles, scales, zeros, bias, pre_quant_scale, in_features, out_features, group_size,
                               bits);
  if (has_tangent(scales) || (at::GradMode::is_enabled() && trained))
    return LinearFunction::apply(x, tiles, scales, zeros, bias, pre_quant_scale, in_features, out_features, group_size,
                                 bits, compute_dtype);
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_linear(x, tiles, scales, zeros, bias, pre_quant_scale, in_features, out_features, group_size, bits,
                     compute_dtype);
}

Tensor quant_linear_cuda(const Tensor& x, const Tensor& tiles, const Tensor& scales, const Tensor& zeros,
                         const OptionalTensor& bias, const OptionalTensor& pre_quant_scale, int64_t in_features,
                         int64_t out_features, int64_t group_size, int64_t bits, std::string_view compute_dtype) {
  if (const auto y = usual_cuda_linear(x, tiles, scales, zeros, bias, pre_quant_scale, in_features, out_features,
                                       group_size, bits, compute_dtype))
    return *y;
  static const auto by_python = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("awq_ext::quant_linear_by_python", "")
                                    .typed<decltype(quant_linear_cpu)>();
  return by_python.call(x, tiles, scales, zeros, bias, pre_quant_scale, in_features, out_features, group_size, bits,
                        compute_dtype);
}

// Like nn.Linear under autocast: the input is cast, and the output has the dtype that it is cast to. As there, the cast
// of a leaf that needs a gradient is kept until autocast ends.
template <c10::DeviceType kDevice, c10::DispatchKey kAutocast>
Tensor quant_linear_autocast(const Tensor& x, const Tensor& tiles, const Tensor& scales, const Tensor& zeros,
                             const OptionalTensor& bias, const OptionalTensor& pre_quant_scale, int64_t in_features,
                             int64_t out_features, int64_t group_size, int64_t bits, std::string_view compute_dtype) {
  const c10::impl::ExcludeDispatchKeyGuard off(kAutocast);
  const Tensor cast = at::autocast::cached_cast(at::autocast::get_autocast_dtype(kDevice), x, kDevice);
  return call_linear(cast, tiles, scales, zeros, bias, pre_quant_scale, in_features, out_features, group_size, bits,
                     compute_dtype);
}

}  // namespace
}  // namespace awq

TORCH_LIBRARY(awq_ext, m) {
  const std::string kArguments =
      "(Tensor x, Tensor tiles, Tensor scales, Tensor zeros, Tensor? bias, Tensor? pre_quant_scale, "
      "int in_features, int out_features, int group_size, int bits, str compute_dtype=\"auto\") -> Tensor";
  // the second is for quant_linear_cuda alone
  for (const char* name : {"quant_linear", "quant_linear_by_python"}) m.def((name + kArguments).c_str());
  m.def(
      "quant_weight(Tensor tiles, Tensor scales, Tensor zeros, int in_features, int out_features, int group_size, "
      "int bits) -> Tensor");
  m.def(
      "quant_scale_gradient(Tensor gradient, Tensor x, Tensor tiles, Tensor scales, Tensor zeros, Tensor? "
      "pre_quant_scale, int in_features, int out_features, int group_size, int bits) -> Tensor");
}

TORCH_LIBRARY_IMPL(awq_ext, CPU, m) {
  m.impl("quant_linear", &awq::quant_linear_cpu);
  m.impl("quant_weight", &awq::quant_weight_cpu);
  m.impl("quant_scale_gradient", &awq::quant_scale_gradient_cpu);
}

TORCH_LIBRARY_IMPL(awq_ext, Autograd, m) {
  m.impl("quant_linear", &awq::quant_linear_autograd);
  m.impl("quant_weight", torch::CppFunction::makeFallthrough());  // its inputs need no gradients
  m.impl("quant_scale_gradient", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(awq_ext, CUDA, m) { m.impl("quant_linear", &awq::quant_linear_cuda); }

TORCH_LIBRARY_IMPL(awq_ext, AutocastCPU, m) {
  m.impl("quant_linear", &awq::quant_linear_autocast<at::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(awq_ext, AutocastCUDA, m) {
  m.impl("quant_linear", &awq::quant_linear_autocast<at::kCUDA, c10::DispatchKey::AutocastCUDA>);
}
