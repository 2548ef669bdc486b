#include "adapters/cuda_linear.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <list>

#include "adapters/bindings.h"
#include "base/layout.h"
#include "cuda/awq_cuda.h"

namespace awq {
namespace {

using at::Tensor;

// What is called of a library of CUDA kernels. Python, which loads the library, says where its functions are.
struct CudaLibrary {
  decltype(&awq_cuda_linear) linear;
  decltype(&awq_cuda_linear_parts) linear_parts;
  decltype(&awq_cuda_error) error;
  // aoti_torch_get_current_cuda_stream of torch's C interface (torch/csrc/inductor/aoti_torch/c/shim.h); null for a
  // device without streams
  int32_t (*current_stream)(int32_t device, void** stream);
  c10::DeviceType device;
};

std::atomic<const CudaLibrary*> used{nullptr};

// The type of csrc/cuda/awq_cuda.h; -1 for what it has none for.
int64_t type_of(at::ScalarType dtype) {
  return dtype == at::kFloat ? 0 : dtype == at::kHalf ? 1 : dtype == at::kBFloat16 ? 2 : -1;
}

bool kernels_wanted() {
  const char* backend = std::getenv("AWQ_EXT_BACKEND");
  return backend == nullptr || *backend == 0 || std::strcmp(backend, "compiled") == 0;
}

// On the device, contiguous, and with its first byte where kernels can read 16 at a time.
bool readable(const Tensor& t, c10::Device device) {
  return t.device() == device && t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

struct Sizes {
  int64_t n, k, group;
};

bool weight_is_usual(const Tensor& tiles, const Tensor& scales, const Tensor& zeros, const Sizes& s, int64_t bits) {
  const int64_t count = tile_count(s.n), groups = ceil_div(s.k, s.group);
  const c10::Device device = tiles.device();
  return readable(tiles, device) && tiles.scalar_type() == at::kByte &&
         tiles.sizes() == at::IntArrayRef{count, step_count(s.k, s.group), step_bytes(static_cast<int>(bits))} &&
         readable(scales, device) && (scales.scalar_type() == at::kHalf || scales.scalar_type() == at::kBFloat16) &&
         scales.sizes() == at::IntArrayRef{count, groups, kTileOutputs} && readable(zeros, device) &&
         zeros.scalar_type() == at::kByte &&
         zeros.sizes() == at::IntArrayRef{count, groups, tile_zero_bytes(static_cast<int>(bits))};
}

bool rows_are_usual(const Tensor& x, const std::optional<Tensor>& bias, c10::Device device, const Sizes& s) {
  return (x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16) && x.dim() >= 1 && x.size(-1) == s.k &&
         readable(x, device) &&
         (!bias.has_value() || (bias->device() == device && bias->is_contiguous() && bias->dim() == 1 &&
                                bias->size(0) == s.n && type_of(bias->scalar_type()) >= 0));
}

Tensor launch(const CudaLibrary& library, const Tensor& x, const Tensor& tiles, const Tensor& scales,
              const Tensor& zeros, const std::optional<Tensor>& bias, const Sizes& s, int64_t bits) {
  at::DimVector shape(x.sizes().begin(), x.sizes().end());
  shape.back() = s.n;
  const int64_t rows = x.numel() / s.k;
  const Tensor y = at::empty(shape, x.options());
  const c10::OptionalDeviceGuard there(x.device());
  void* stream = nullptr;
  if (library.current_stream != nullptr)
    TORCH_CHECK(library.current_stream(x.device().index(), &stream) == 0, "awq_ext: torch has no current CUDA stream");
  Tensor parts;
  if (const int64_t count = library.linear_parts(rows, s.n, s.k, s.group); count > 1)
    parts = at::empty({count, rows, s.n}, x.options().dtype(at::kFloat));
  const int64_t error = library.linear(stream, x.const_data_ptr(), type_of(x.scalar_type()), rows, s.k,
                                       tiles.const_data_ptr(), scales.const_data_ptr(), type_of(scales.scalar_type()),
                                       zeros.const_data_ptr(), bias.has_value() ? bias->const_data_ptr() : nullptr,
                                       bias.has_value() ? type_of(bias->scalar_type()) : 0, s.n, s.k, s.group, bits,
                                       parts.defined() ? parts.mutable_data_ptr() : nullptr, y.mutable_data_ptr());
  TORCH_CHECK(error == 0, "awq_ext's CUDA kernel 'linear' could not be started: ", library.error(error),
              ". AWQ_EXT_BACKEND=reference in the environment does without these kernels");
  return y;
}

}  // namespace

std::optional<Tensor> usual_cuda_linear(const Tensor& x, const Tensor& tiles, const Tensor& scales, const Tensor& zeros,
                                        const std::optional<Tensor>& bias, const std::optional<Tensor>& pre_quant_scale,
                                        int64_t in_features, int64_t out_features, int64_t group_size, int64_t bits,
                                        std::string_view compute_dtype) {
  const CudaLibrary* library = used.load();
  if (library == nullptr || x.device().type() != library->device || pre_quant_scale.has_value() ||
      compute_dtype != "auto" || !kernels_wanted())
    return std::nullopt;
  if ((bits != 4 && bits != 8) || in_features <= 0 || in_features % 8 != 0 || out_features <= 0 || x.numel() == 0 ||
      (group_size != -1 && (group_size <= 0 || (group_size % 4 != 0 && group_size < in_features))))
    return std::nullopt;
  const Sizes s{out_features, in_features, group_length(in_features, group_size)};
  if (!weight_is_usual(tiles, scales, zeros, s, bits) || !rows_are_usual(x, bias, tiles.device(), s))
    return std::nullopt;
  return launch(*library, x, tiles, scales, zeros, bias, s, bits);
}

void bind_cuda(py::module_& m) {
  m.def(
      "use_cuda_library",
      [](const std::string& device, uintptr_t linear, uintptr_t linear_parts, uintptr_t error,
         uintptr_t current_stream) {
        static std::list<CudaLibrary> all;  // kept: another thread may be calling one
        all.push_back({reinterpret_cast<decltype(CudaLibrary::linear)>(linear),
                       reinterpret_cast<decltype(CudaLibrary::linear_parts)>(linear_parts),
                       reinterpret_cast<decltype(CudaLibrary::error)>(error),
                       reinterpret_cast<decltype(CudaLibrary::current_stream)>(current_stream),
                       c10::Device(device).type()});
        used.store(linear == 0 ? nullptr : &all.back());
      },
      py::arg("device"), py::arg("linear"), py::arg("linear_parts"), py::arg("error"), py::arg("current_stream"),
      "Where the functions of a library of CUDA kernels are that usual_cuda_linear calls; 0 for linear: nowhere.");
  m.def("usual_cuda_linear", &usual_cuda_linear, py::call_guard<py::gil_scoped_release>(),
        "quant_linear on a GPU where nothing is unusual about its arguments, else None.");
}

}  // namespace awq
