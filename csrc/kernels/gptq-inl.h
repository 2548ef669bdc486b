// The sequential part of rounding with error feedback: the channels of one panel in turn, weight rows along the lanes.

// Rows: from one channel of the factor to the next; Width: weight rows.
template <int Rows, int Width>
inline void round_panel(const GptqPanel* panel, float* sums, float* errors, uint8_t* codes) {
  for (int c = 0; c < panel->channels; ++c) {
    const float* factor = panel->factor + c * Rows;
    const float* weights = panel->weights + c * Width;
    const float* steps = panel->steps + panel->groups[c] * Width;
    const float* zeros = panel->zeros + panel->groups[c] * Width;
    float* error = errors + c * Width;
    const float* sum = sums + c * Width;
    uint8_t* code = codes + panel->order[c] * Width;
    const float pivot = factor[c], top = panel->top;
    for (int later = c + 1; panel->again && later < panel->channels; ++later) {
      const Vec share = splat(factor[later]);
      float* out = sums + c * Width;
      for (int v = 0; v < Width; v += kLanes)
        store(out + v, fma(share, load(errors + later * Width + v), load(out + v)));
    }
#pragma omp simd
    for (int r = 0; r < Width; ++r) {
      const float q = code_of(weights[r] + sum[r] / pivot, Grid{steps[r], zeros[r], top, 0});
      code[r] = static_cast<uint8_t>(static_cast<int32_t>(q));
      error[r] = weights[r] - (q - zeros[r]) * steps[r];
    }
    for (int later = c + 1; later < panel->channels; ++later) {
      const Vec share = splat(factor[later]);
      float* out = sums + later * Width;
      for (int v = 0; v < Width; v += kLanes) store(out + v, fma(share, load(error + v), load(out + v)));
    }
  }
}

void gptq_panel(const GptqPanel* panel, float* sums, float* errors, uint8_t* codes) {
  round_panel<kRows, kWidth>(panel, sums, errors, codes);
}
