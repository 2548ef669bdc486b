// Codes that gradients move, a group at a time. Plain loops: the compiler vectorizes them at every level.

// (start + moved) rounded half to even, as code_of of quantize-inl.h rounds: positions are far below 2^22.
inline float code_at(float position, float top) {
  constexpr float kMagic = 0x1.8p23f;
  float t = (position + kMagic) - kMagic;
  t = t > 0.0f ? t : 0.0f;
  return t < top ? t : top;
}

void learned_group(const float* start, const float* moved, const float* channel_scale, int64_t n,
                   const LearnedGroup* group, float* out) {
  const LearnedGroup g = *group;
  if (channel_scale == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (code_at(start[i] + moved[i], g.top) - g.zero) * g.scale * g.divisor;
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      out[i] = (code_at(start[i] + moved[i], g.top) - g.zero) * g.scale / channel_scale[i] * g.divisor;
  }
}

float move_group(const float* slope, const float* weight, int64_t n, float step, float reach, float* moved) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    sum += slope[i] * weight[i];
    float to = moved[i] - (slope[i] > 0.0f ? step : slope[i] < 0.0f ? -step : 0.0f);
    to = to > -reach ? to : -reach;
    moved[i] = to < reach ? to : reach;
  }
  return sum;
}
