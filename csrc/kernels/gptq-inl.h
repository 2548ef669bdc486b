// The sequential part of rounding with error feedback: the channels of one panel in turn, weight rows along the lanes.

void gptq_panel(const GptqPanel* panel, float* sums, float* errors, uint8_t* codes) {
  for (int c = 0; c < panel->channels; ++c) {
    const float* factor = panel->factor + c * kRows;
    const float* weights = panel->weights + c * kWidth;
    const float* steps = panel->steps + panel->groups[c] * kWidth;
    const float* zeros = panel->zeros + panel->groups[c] * kWidth;
    float* error = errors + c * kWidth;
    const float* sum = sums + c * kWidth;
    uint8_t* code = codes + panel->order[c] * kWidth;
    const float pivot = factor[c], top = panel->top;
    for (int later = c + 1; panel->again && later < panel->channels; ++later) {
      const Vec share = splat(factor[later]);
      float* out = sums + c * kWidth;
      for (int v = 0; v < kWidth; v += kLanes)
        store(out + v, fma(share, load(errors + later * kWidth + v), load(out + v)));
    }
#pragma omp simd
    for (int r = 0; r < kWidth; ++r) {
      const float q = code_of(weights[r] + sum[r] / pivot, Grid{steps[r], zeros[r], top, 0});
      code[r] = static_cast<uint8_t>(static_cast<int32_t>(q));
      error[r] = weights[r] - (q - zeros[r]) * steps[r];
    }
    for (int later = c + 1; later < panel->channels; ++later) {
      const Vec share = splat(factor[later]);
      float* out = sums + later * kWidth;
      for (int v = 0; v < kWidth; v += kLanes) store(out + v, fma(share, load(error + v), load(out + v)));
    }
  }
}
