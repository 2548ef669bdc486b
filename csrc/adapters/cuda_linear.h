// The usual call of a Linear on a GPU without Python, which takes longer to check arguments and find pointers than the
// kernel runs with few rows. All that is unusual is left to awq_ext/kernels/cuda/linear.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

namespace awq {

// quant_linear of fp16 or bf16 rows, where all tensors have the right shapes and dtypes, are contiguous and aligned,
// and need no copy, as those of a layer do. Nothing for all other arguments, wrong ones too, without a library, and
// with another AWQ_EXT_BACKEND than "compiled" in the environment. RuntimeError if the kernel cannot be started.
std::optional<at::Tensor> usual_cuda_linear(const at::Tensor& x, const at::Tensor& tiles, const at::Tensor& scales,
                                            const at::Tensor& zeros, const std::optional<at::Tensor>& bias,
                                            const std::optional<at::Tensor>& pre_quant_scale, int64_t in_features,
                                            int64_t out_features, int64_t group_size, int64_t bits,
                                            std::string_view compute_dtype);

}  // namespace awq
