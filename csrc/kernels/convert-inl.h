// Conversions between storage types. Integer arithmetic throughout, so a thread that flushes subnormals to zero
// (torch.set_flush_denormal) still converts fp16 subnormals, which are ordinary numbers in fp32.

inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // exponent bias 15 -> 127
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal = to_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x400 ? subnormal : normal;
  return from_bits(sign | (magnitude >= 0x7c00 ? special : finite));
}

// Round half to even on the bits: adding 0x7fff plus the lowest kept bit carries exactly when it must. NaN stays NaN.
inline uint32_t bf16_bits(uint32_t bits) {
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40) : rounded;
}

inline uint16_t float_to_half(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the spacing is 2^-24: the sum with 0.5 (spacing 2^-24) rounds to it, half to even.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00 : 0x7c00;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite));  // >= 65520 rounds to infinity
}

void to_float(const void* src, Dtype dtype, int64_t n, float* dst) {
  const uint16_t* bits = static_cast<const uint16_t*>(src);
  if (dtype == Dtype::f32) {
    __builtin_memcpy(dst, src, static_cast<size_t>(n) * 4);
  } else if (dtype == Dtype::bf16) {
    for (int64_t i = 0; i < n; ++i) dst[i] = from_bits(static_cast<uint32_t>(bits[i]) << 16);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = half_to_float(bits[i]);
  }
}

void from_float(const float* src, Dtype dtype, int64_t n, void* dst) {
  uint16_t* bits = static_cast<uint16_t*>(dst);
  if (dtype == Dtype::f32) {
    __builtin_memcpy(dst, src, static_cast<size_t>(n) * 4);
  } else if (dtype == Dtype::bf16) {
    for (int64_t i = 0; i < n; ++i) bits[i] = static_cast<uint16_t>(bf16_bits(to_bits(src[i])));
  } else {
    for (int64_t i = 0; i < n; ++i) bits[i] = float_to_half(src[i]);
  }
}

void round_to_bf16(float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = from_bits(bf16_bits(to_bits(x[i])) << 16);
}
