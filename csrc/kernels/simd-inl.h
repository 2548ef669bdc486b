// One vector of floats, as wide as the level's registers, in the compilers' own vector types: arithmetic, comparisons
// and conversions need no intrinsics. Included inside the anonymous namespace of each level's file.

#if defined(AWQ_LEVEL_AVX512)
constexpr int kLanes = 16;
#elif defined(AWQ_LEVEL_AVX2)
constexpr int kLanes = 8;
#elif defined(AWQ_LEVEL_NEON) || defined(AWQ_LEVEL_SCALAR)  // what every aarch64, and every x86-64 (SSE2), has
constexpr int kLanes = 4;
#else
#error "a level's file defines one of AWQ_LEVEL_AVX512, AWQ_LEVEL_AVX2, AWQ_LEVEL_NEON, AWQ_LEVEL_SCALAR"
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef float VecUnaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }  // -0 stays -0: x - (+0)

// kLanes bytes, widened. By intrinsics, because GCC 12 splits a vector conversion between unequal widths into scalars.
inline VecInt load_bytes(const uint8_t* p) {
#if defined(AWQ_LEVEL_AVX512)
  return (VecInt)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(AWQ_LEVEL_AVX2)
  return (VecInt)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return VecInt{p[0], p[1], p[2], p[3]};
#endif
}

// a * b + c in one rounding where the level has the instruction.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(AWQ_LEVEL_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(AWQ_LEVEL_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(AWQ_LEVEL_NEON)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

// The sum of all lanes, by halves.
inline float sum_lanes(Vec v) {
#if defined(AWQ_LEVEL_AVX512)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}
