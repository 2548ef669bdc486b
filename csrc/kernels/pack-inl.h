// Copies into the panels that gemm-inl.h and gemm-amx-inl.h read, and the column sums over the same data.

void pack_columns(const float* x, int64_t ldx, int64_t rows, int64_t cols, int64_t width, float* out) {
  for (int64_t r = 0; r < rows; ++r, x += ldx, out += width) {
    for (int64_t c = 0; c < cols; ++c) out[c] = x[c];
    for (int64_t c = cols; c < width; ++c) out[c] = 0.0f;
  }
}

// out [ceil(rows / 2)][width][2]: pairs of consecutive rows.
[[maybe_unused]] void pack_column_pairs(const uint16_t* x, int64_t ldx, int64_t rows, int64_t cols, int64_t width,
                                        uint16_t* out) {
  for (int64_t r = 0; r < rows; r += 2, x += 2 * ldx, out += 2 * width) {
    const bool whole = r + 1 < rows;
    const uint16_t* next = whole ? x + ldx : x;
    const uint32_t keep = whole ? 0xffffffffu : 0x0000ffffu;  // an odd last row is paired with zeros
    for (int64_t c = 0; c < cols; ++c) {
      const uint32_t pair = (x[c] | static_cast<uint32_t>(next[c]) << 16) & keep;
      __builtin_memcpy(out + 2 * c, &pair, 4);
    }
    for (int64_t c = 2 * cols; c < 2 * width; ++c) out[c] = 0;
  }
}

void pack_rows(const float* x, int64_t ldx, int64_t k, float* out) {
  for (int64_t i = 0; i < k; ++i, out += kRows)
    for (int m = 0; m < kRows; ++m) out[m] = x[m * ldx + i];
}

#if defined(AWQ_LEVEL_BF16)
void pack_row_pairs(const float* x, int64_t ldx, int64_t k, int, uint16_t* out) {
  for (int64_t i = 0; i < k; i += 2, out += 2 * kRows)
    for (int m = 0; m < kRows; ++m) {
      const float* row = x + m * ldx + i;
      const uint32_t pair = to_bits(row[0]) >> 16 | (to_bits(row[1]) & 0xffff0000u);
      __builtin_memcpy(out + 2 * m, &pair, 4);
    }
}

template <int Width>
void pack_pairs(const uint16_t* x, int64_t ldx, int64_t rows, int64_t cols, int, uint16_t* out) {
  pack_column_pairs(x, ldx, rows, cols, Width, out);
}
#endif

void add_sums(const float* x, int64_t n, double* sum, double* abs_sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    double total = sum[i], abs_total = abs_sum[i];
    for (int r = 0; r < kSumRows; ++r) {
      const double value = x[r * n + i];
      total += value;
      abs_total += __builtin_fabs(value);
    }
    sum[i] = total;
    abs_sum[i] = abs_total;
  }
}

void add_weighted_sums(const float* x, const float* weights, const float* roots, int64_t n, double* sum,
                       double* abs_sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    double total = sum[i], abs_total = abs_sum[i];
    for (int r = 0; r < kSumRows; ++r) {
      const float value = x[r * n + i];
      total += static_cast<double>(weights[r]) * value;
      abs_total += __builtin_fabs(static_cast<double>(roots[r] * value));
    }
    sum[i] = total;
    abs_sum[i] = abs_total;
  }
}
