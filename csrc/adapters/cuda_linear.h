// The usual call of a Linear on a GPU without Python, which takes longer to check arguments and find pointers than the
// kernel runs with few rows. All that is unusual is left to awq_ext/kernels/cuda/linear.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "cuda/awq_cuda.h"

namespace awq {

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

// From now on this library is called; null: none.
void use_cuda_library(const CudaLibrary* library);

// quant_linear of fp16 or bf16 rows, where all tensors have the right shapes and dtypes, are contiguous and aligned,
// and need no copy, as those of a layer do. Nothing for all other arguments, wrong ones too, without a library, and
// with another AWQ_EXT_BACKEND than "compiled" in the environment. RuntimeError if the kernel cannot be started.
std::optional<at::Tensor> usual_cuda_linear(const at::Tensor& x, const at::Tensor& tiles, const at::Tensor& scales,
                                            const at::Tensor& zeros, const std::optional<at::Tensor>& bias,
                                            const std::optional<at::Tensor>& pre_quant_scale, int64_t in_features,
                                            int64_t out_features, int64_t group_size, int64_t bits,
                                            std::string_view compute_dtype);

}  // namespace awq
