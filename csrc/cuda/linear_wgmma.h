// y = x W^T for many rows of activations, on the tensor cores of Hopper: see linear_wgmma.cu.
#pragma once

#include "cuda/linear_small.h"

namespace awq::cuda {

// Up to so many rows other kernels are taken. On an H200 this one took, with up to 64 rows, as long as linear_small.h
// with 16, and half as long as that with 32.
constexpr int64_t kWithoutWgmma = 16;

// Whether so many rows would be multiplied by wgmma if the weight's groups allow it: not refused in the environment, on
// a device of compute capability 9.x, with code for sm_90a in this library.
bool wgmma_wanted(int64_t rows);
// Whether the weight's groups do: one a row, or multiples of 32 channels when padded to whole steps.
bool wgmma_takes(const Weight& w);
// Parts of the channels that are multiplied by blocks of their own (linear_parts.h); 1 for none.
int64_t wgmma_parts(const Weight& w, int64_t rows);
// parts: fp32 [wgmma_parts][rows][n], null if that is 1.
int64_t launch_wgmma(void* stream, const Weight& w, const LinearRows& rows, int bits, bool half, float* parts);

}  // namespace awq::cuda
