// Four-bit codes, two a byte (layout.h): packing, and products with a few activation rows straight from the bytes.

void pack_int4(const uint8_t* codes, int64_t n, uint8_t* packed) {
#pragma omp simd
  for (int64_t i = 0; i < n / 2; ++i) packed[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  if (n % 2 != 0) packed[n / 2] = codes[n - 1];
}

void unpack_int4(const uint8_t* packed, int64_t n, uint8_t* codes) {
#pragma omp simd
  for (int64_t i = 0; i < n / 2; ++i) {
    codes[2 * i] = packed[i] & 15;
    codes[2 * i + 1] = packed[i] >> 4;
  }
  if (n % 2 != 0) codes[n - 1] = packed[n / 2] & 15;
}

// M is a compile-time number of rows, so that the accumulators are registers. The codes of a byte are decoded once for
// all rows. Sums: two accumulators per lane and row within a group, then scaled into the row's total.
template <int M>
void int4_dot_rows(const uint8_t* packed, const float* steps, const uint8_t* zeros, int64_t bytes, int64_t group_bytes,
                   const float* x, int64_t ldx, float* y, int64_t ldy) {
  Vec total[M] = {};
  float rest[M] = {};  // what does not fill a vector
  for (int64_t begin = 0, g = 0; begin < bytes; begin += group_bytes, ++g) {
    const int64_t end = begin + group_bytes < bytes ? begin + group_bytes : bytes;
    const float zero = static_cast<float>(zeros[g]), step = steps[g];
    const Vec vzero = splat(zero), vstep = splat(step);
    Vec sum[M] = {}, odd[M] = {};  // two chains of additions: half the waiting for each other
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const VecInt codes = load_bytes(packed + i);
      const Vec low = __builtin_convertvector(codes & 15, Vec) - vzero;
      const Vec high = __builtin_convertvector(codes >> 4, Vec) - vzero;
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float* row = x + 2 * m * ldx + i;
        sum[m] = fma(low, load(row), sum[m]);
        odd[m] = fma(high, load(row + ldx), odd[m]);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) total[m] = fma(sum[m] + odd[m], vstep, total[m]);
    for (; i < end; ++i) {
      const float low = static_cast<float>(packed[i] & 15) - zero, high = static_cast<float>(packed[i] >> 4) - zero;
      for (int m = 0; m < M; ++m) {
        const float* row = x + 2 * m * ldx + i;
        rest[m] += (low * row[0] + high * row[ldx]) * step;
      }
    }
  }
  for (int m = 0; m < M; ++m) y[m * ldy] = sum_lanes(total[m]) + rest[m];
}

void int4_dot(const uint8_t* packed, const float* steps, const uint8_t* zeros, int64_t bytes, int64_t group_bytes,
              const float* x, int64_t ldx, int rows, float* y, int64_t ldy) {
  decltype(&int4_dot_rows<1>)
      const by_rows[] = {int4_dot_rows<1>, int4_dot_rows<2>, int4_dot_rows<3>, int4_dot_rows<4>,
                         int4_dot_rows<5>, int4_dot_rows<6>, int4_dot_rows<7>, int4_dot_rows<8>};
  by_rows[rows - 1](packed, steps, zeros, bytes, group_bytes, x, ldx, y, ldy);
}
