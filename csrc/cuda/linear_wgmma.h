// y = x W^T for many rows of activations, on the tensor cores of Hopper: see linear_wgmma.cu.
#pragma once

#include "cuda/linear_small.h"

namespace awq::cuda {

// Whether so many rows would be multiplied by wgmma if the weight's groups allow it: asked for in the environment, on a
// device of compute capability 9.x, with code for sm_90a in this library.
bool wgmma_wanted(int64_t rows);
// Whether the weight's groups do: one a row, or multiples of 32 channels when padded to whole steps.
bool wgmma_takes(const Weight& w);
int64_t launch_wgmma(void* stream, const Weight& w, const LinearRows& rows, int bits, bool half);

}  // namespace awq::cuda
