// Packing of four-bit codes, two per byte, as the rows of a checkpoint have them (base/layout.h).

uint8_t pack_int4(const uint8_t* codes, int64_t n, uint8_t* packed) {
  uint8_t seen = 0;
#pragma omp simd reduction(| : seen)
  for (int64_t i = 0; i < n / 2; ++i) {
    packed[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
    seen |= codes[2 * i] | codes[2 * i + 1];
  }
  if (n % 2 == 0) return seen;
  packed[n / 2] = codes[n - 1];
  return seen | codes[n - 1];
}

void unpack_int4(const uint8_t* packed, int64_t n, uint8_t* codes) {
#pragma omp simd
  for (int64_t i = 0; i < n / 2; ++i) {
    codes[2 * i] = packed[i] & 15;
    codes[2 * i + 1] = packed[i] >> 4;
  }
  if (n % 2 != 0) codes[n - 1] = packed[n / 2] & 15;
}
