// Eight tile registers of 16 rows of 64 bytes and the products of two of them: Intel's AMX (Software Developer's
// Manual, volume 2, TDPBF16PS and TDPBSUD), or the same in plain C++, so that what is written against these functions
// runs, and is tested, on every processor. Integers are the same in both, bit for bit; sums of floats pass the same
// roundings in the same order as the manual gives them.
//
// The use of the registers is fixed:
//   0..3  sums     16 rows of 16 numbers of 4 bytes
//   4, 5  left     16 rows of `depth` words: two bf16, or four signed bytes, of consecutive k
//   6, 7  right    `depth` rows of 16 words: two bf16, or four unsigned bytes, of the same k, for 16 columns
// A product adds left times right to a sum.

constexpr int kTileSide = 16;    // rows of a tile, and words in a row
constexpr int kTileBytes = 64;   // in a row
constexpr int kTileWords = 256;  // in a tile

#if defined(AWQ_LEVEL_AMX)

struct alignas(64) TileConfig {  // what LDTILECFG reads
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// All of these clobber memory: the intrinsics of GCC 12 do not say that a tile is read from memory, and stores into it
// may then be dropped.
inline void tile_configure(int depth) {
  TileConfig config = {};
  config.palette = 1;
  for (int t = 0; t < 8; ++t) {
    config.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 4 * depth : kTileBytes);
    config.rows[t] = static_cast<uint8_t>(t < 6 ? kTileSide : depth);
  }
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Rows `stride` bytes apart.
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
inline void tile_loadt(const void* p, int64_t stride) {
  asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
// The same for what is not read again soon: it comes from the second-level cache and displaces nothing in the first.
template <int T>
inline void tile_load_once(const void* p, int64_t stride) {
  asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(p), "r"(stride) : "memory");
}
template <int Sum, int Left, int Right>
inline void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}
template <int Sum, int Left, int Right>
inline void tile_dot_int8() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sum), "i"(Left), "i"(Right));
}

#else

struct EmulatedTiles {
  int depth;
  alignas(64) unsigned char bytes[8][kTileSide][kTileBytes];
};
thread_local EmulatedTiles tiles;

inline int tile_rows_of(int t) { return t < 6 ? kTileSide : tiles.depth; }
inline size_t tile_row_bytes(int t) { return t == 4 || t == 5 ? 4 * static_cast<size_t>(tiles.depth) : kTileBytes; }

inline void tile_configure(int depth) {
  tiles.depth = depth;
  __builtin_memset(tiles.bytes, 0, sizeof(tiles.bytes));
}
// Nothing may rely on tiles afterwards: what is left in them would show.
inline void tile_release() { __builtin_memset(tiles.bytes, 0xff, sizeof(tiles.bytes)); }

template <int T>
inline void tile_zero() {
  __builtin_memset(tiles.bytes[T], 0, sizeof(tiles.bytes[T]));
}
template <int T>
inline void tile_load(const void* p, int64_t stride) {
  for (int r = 0; r < tile_rows_of(T); ++r)
    __builtin_memcpy(tiles.bytes[T][r], static_cast<const char*>(p) + r * stride, tile_row_bytes(T));
}
template <int T>
inline void tile_load_once(const void* p, int64_t stride) {
  tile_load<T>(p, stride);
}
template <int T>
inline void tile_store(void* p, int64_t stride) {
  for (int r = 0; r < tile_rows_of(T); ++r)
    __builtin_memcpy(static_cast<char*>(p) + r * stride, tiles.bytes[T][r], tile_row_bytes(T));
}

// Subnormal inputs and results count as 0.
inline float flush(float x) { return (to_bits(x) & 0x7f800000u) == 0 ? from_bits(to_bits(x) & 0x80000000u) : x; }

// The two bf16 of `count` words.
inline void unpack_words(const unsigned char* words, int count, float* first, float* second) {
  for (int i = 0; i < count; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, words + 4 * i, 4);
    first[i] = flush(from_bits(bits << 16));
    second[i] = flush(from_bits(bits & 0xffff0000u));
  }
}

template <int Sum, int Left, int Right>
inline void tile_dot_bf16() {
  float first[kTileSide], second[kTileSide], right_first[kTileWords], right_second[kTileWords];
  unpack_words(tiles.bytes[Right][0], tiles.depth * kTileSide, right_first, right_second);
  for (int m = 0; m < kTileSide; ++m) {
    float even[kTileSide] = {}, odd[kTileSide] = {};
    unpack_words(tiles.bytes[Left][m], tiles.depth, first, second);
    for (int k = 0; k < tiles.depth; ++k) {
      const float *a = right_first + k * kTileSide, *b = right_second + k * kTileSide;
#pragma omp simd
      for (int n = 0; n < kTileSide; ++n) {
        even[n] = flush(even[n] + first[k] * a[n]);
        odd[n] = flush(odd[n] + second[k] * b[n]);
      }
    }
    float sum[kTileSide];
    __builtin_memcpy(sum, tiles.bytes[Sum][m], kTileBytes);
    for (int n = 0; n < kTileSide; ++n) sum[n] = flush(flush(sum[n]) + flush(even[n] + odd[n]));
    __builtin_memcpy(tiles.bytes[Sum][m], sum, kTileBytes);
  }
}

template <int Sum, int Left, int Right>
inline void tile_dot_int8() {
  for (int m = 0; m < kTileSide; ++m) {
    int32_t sum[kTileSide];
    __builtin_memcpy(sum, tiles.bytes[Sum][m], kTileBytes);
    for (int k = 0; k < 4 * tiles.depth; ++k) {
      const int32_t factor = static_cast<signed char>(tiles.bytes[Left][m][k]);
      const unsigned char* right = tiles.bytes[Right][k / 4] + k % 4;
      for (int n = 0; n < kTileSide; ++n) sum[n] += factor * right[4 * n];
    }
    __builtin_memcpy(tiles.bytes[Sum][m], sum, kTileBytes);
  }
}

#endif
