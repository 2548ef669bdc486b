// The group quantizer, element by element. Plain loops: the compiler vectorizes them at every level.

void multiply(const float* a, const float* b, int64_t n, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = a[i] * b[i];
}

// By hand, because without -ffast-math a compiler must not reorder a minimum.
Range group_range(const float* w, int64_t n) {
  float lo = 0.0f, hi = 0.0f;
  bool differs = false;
  int64_t i = 0;
  if (n >= kLanes) {
    const Vec first = splat(w[0]);
    Vec vlo = {}, vhi = {};
    VecInt vdiffers = {};
    for (; i + kLanes <= n; i += kLanes) {
      const Vec v = load(w + i);
      vlo = v < vlo ? v : vlo;
      vhi = v > vhi ? v : vhi;
      vdiffers |= v != first;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      lo = vlo[lane] < lo ? vlo[lane] : lo;
      hi = vhi[lane] > hi ? vhi[lane] : hi;
      differs |= vdiffers[lane] != 0;
    }
  }
  for (; i < n; ++i) {
    lo = w[i] < lo ? w[i] : lo;
    hi = w[i] > hi ? w[i] : hi;
    differs |= w[i] != w[0];
  }
  return {lo, hi, w[0], !differs && w[0] != 0.0f};
}

// The code of one weight, as a float. Adding 1.5 * 2^23 leaves no fraction bits, so the hardware rounds the sum to an
// integer, half to even. That holds below 2^22, so the quotient is first clamped to +-2^20, far outside every range of
// codes; the comparisons turn NaN into the lower end.
inline float code_of(float w, const Grid& grid) {
  constexpr float kBound = 0x1p20f, kMagic = 0x1.8p23f;
  float t = w / grid.step;
  t = t > -kBound ? t : -kBound;
  t = t < kBound ? t : kBound;
  t = (t + kMagic) - kMagic + grid.zero;
  t = t > 0.0f ? t : 0.0f;
  return t < grid.top ? t : grid.top;
}

void quantize_group(const float* w, int64_t n, const Grid* grid, uint8_t* codes) {
  const Grid local = *grid;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(static_cast<int32_t>(code_of(w[i], local)));
}

void dequantize_group(const uint8_t* codes, int64_t n, float step, float zero, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (static_cast<float>(static_cast<int32_t>(codes[i])) - zero) * step;
}

void group_error(const float* scaled, const float* w, const float* channel_scale, int64_t n, const Grid* grid,
                 float* error) {
  const Grid local = *grid;
  if (channel_scale == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) error[i] = (code_of(scaled[i], local) - local.zero) * local.step - w[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      error[i] = (code_of(scaled[i], local) - local.zero) * local.step / channel_scale[i] - w[i];
  }
}
