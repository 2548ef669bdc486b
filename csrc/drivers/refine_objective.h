// What refine.cpp and refine_scales.cpp share: the matrix of their objective, and when a step moves.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace awq {

// H = diag(1/s) moment diag(1/s) + damping * its diagonal.
struct DampedMoment {
  const float* moment;  // [k, k]
  int64_t k;
  const float* channel_scale;  // s [k], or null for 1
  double damping;
  // The diagonal entry of a channel that no input enters. It has no best code, and any positive number leaves it the
  // code that rounding gives; this one is so small that the other channels decide on the group's step.
  float unseen = 1.0f;

  DampedMoment(const float* second_moment, int64_t channels, const float* s, double share)
      : moment(second_moment), k(channels), channel_scale(s), damping(share) {
    double total = 0.0;
    for (int64_t i = 0; i < k; ++i) total += own(i);
    if (const float part = static_cast<float>(1e-6 * total / static_cast<double>(k)); part > 0.0f) unseen = part;
  }

  float own(int64_t i) const {
    const float value = moment[i * k + i];
    return channel_scale == nullptr ? value : value / (channel_scale[i] * channel_scale[i]);
  }

  // out[c] = H[i][first + c] for c < count.
  void row(int64_t i, int64_t first, int64_t count, float* out) const {
    const float* source = moment + i * k + first;
    if (channel_scale == nullptr)
      for (int64_t c = 0; c < count; ++c) out[c] = source[c];
    else
      for (int64_t c = 0; c < count; ++c) out[c] = source[c] / (channel_scale[i] * channel_scale[first + c]);
    if (i < first || i >= first + count) return;
    float& diagonal = out[i - first];
    diagonal = diagonal > 0.0f ? static_cast<float>(diagonal * (1.0 + damping)) : unseen;
  }
};

// The next step of a group: `best` rounded to the storage type, or `step` as before where `best` is not within a factor
// of 2 of it (so it keeps its sign), is NaN, or cannot be stored.
inline float moved_step(const KernelTable& table, Dtype scale_dtype, float step, float best) {
  constexpr float kLargest = 0x1.fep127f;  // of bfloat16; what rounds to infinity in fp16 is larger
  const float sign = step < 0.0f ? -1.0f : 1.0f, old = sign * step, wanted = sign * best;
  if (!(wanted > 0.5f * old && wanted < 2.0f * old)) return step;
  uint16_t bits;
  float rounded;
  table.from_float(&best, scale_dtype, 1, &bits);
  table.to_float(&bits, scale_dtype, 1, &rounded);
  return sign * rounded > 0.0f && sign * rounded <= kLargest ? rounded : step;
}

}  // namespace awq
