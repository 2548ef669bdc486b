// The triangular solve of a Cholesky factorization, rows along the lanes.

// Every number passes the same products, differences and quotient, in the same order, at every level: no FMA.
void solve_rows(const float* factor, int size, float* x, int64_t ldx, int rows) {
  alignas(64) float columns[kFactorBlock * kWidth];
  if (rows < kWidth) __builtin_memset(columns, 0, sizeof(columns));
  for (int m = 0; m < rows; ++m)  // rows are far apart: one at a time
    for (int j = 0; j < size; ++j) columns[j * kWidth + m] = x[m * ldx + j];
  for (int j = size - 1; j >= 0; --j) {
    const float* column = factor + j * kFactorBlock;
    Vec value[kCols];
    for (int v = 0; v < kCols; ++v) {
      float* p = columns + j * kWidth + v * kLanes;
      value[v] = load(p) / splat(column[j]);
      store(p, value[v]);
    }
    for (int i = 0; i < j; ++i) {
      const Vec share = splat(column[i]);
      for (int v = 0; v < kCols; ++v) {
        float* p = columns + i * kWidth + v * kLanes;
        store(p, load(p) - value[v] * share);
      }
    }
  }
  for (int m = 0; m < rows; ++m)
    for (int j = 0; j < size; ++j) x[m * ldx + j] = columns[j * kWidth + m];
}
