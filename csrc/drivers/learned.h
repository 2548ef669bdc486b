// Codes of a Linear while gradients move them: positions between codes, of which the nearest code is taken.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace awq {

// A position can move by half a code to each side of where it began.
constexpr float kReach = 0.5f;

struct LearnedCodes {
  int64_t out_features, in_features, group_length;  // N, K and the channels of a full group
  int bits;                                         // of a code, 1 to 8
  const float* start;                               // [N, K]: where positions began, in codes
  const float* moved;                               // [N, K]: how far they are from there
  const float* scales;                              // [N, G]
  const float* zeros;                               // [N, G]
  const float* channel_scale;                       // [K], which the weight was multiplied by; null: 1
  const float* divisor;                             // [N], which the weight was divided by; null: 1
};

// out[n, k] = (code - zero) * scale / channel_scale * divisor, each step in fp32, then rounded to dtype, with code =
// start + moved rounded half to even and clamped to 0 .. 2^bits - 1.
void learned_weight(const KernelTable& table, const LearnedCodes& codes, Dtype dtype, void* out, int threads);

// A step against the sign of the gradient of that weight, [N, K] of dtype. With w the weight in fp32:
//   moved[n, k]  -= rate * sign(gradient) * sign(scale), and is kept within +- kReach
//   thetas[n, g] -= theta_rate * sign(sum over the group of gradient * w), summed in fp32
// The derivative of w by the logarithm of its scale's size is w; that by its position has the sign of the scale, as
// channel_scale and divisor are positive. moved is codes.moved. NaN has the sign 0.
void move_learned(const KernelTable& table, const LearnedCodes& codes, Dtype dtype, const void* gradient, float rate,
                  float theta_rate, float* moved, float* thetas, int threads);

}  // namespace awq
