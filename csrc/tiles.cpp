#include "tiles.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>

#include "layout.h"
#include "parallel.h"

namespace awq {
namespace {

// body(channel, step, place of the channel in its step) for a run of channels: group by group.
template <class Body>
void for_channels(int64_t in_features, int64_t group_length, const Body& body) {
  int64_t step = 0;
  for (int64_t begin = 0; begin < in_features; begin += group_length) {
    const int64_t length = std::min(group_length, in_features - begin);
    for (int64_t i = 0; i < length; ++i) body(begin + i, step + i / kStepChannels, i % kStepChannels);
    step += ceil_div(length, kStepChannels);
  }
}

// Byte in a step and shift in the byte of output j of the tile, channel c of the step.
constexpr int64_t step_byte(int64_t j, int64_t c) { return 4 * (j % 16) + 2 * (c % 2) + c / 2; }
constexpr int step_shift(int64_t j) { return j < 16 ? 0 : 4; }

}  // namespace

void tile_codes(const uint8_t* rows, int64_t out_features, int64_t in_features, int64_t group_length, uint8_t* tiles,
                int threads) {
  const int64_t bytes = packed_bytes(in_features), tile_bytes = step_count(in_features, group_length) * kStepBytes;
  parallel_for(tile_count(out_features), threads, [&](int64_t t, int) {
    uint8_t* tile = tiles + t * tile_bytes;
    std::fill(tile, tile + tile_bytes, uint8_t{0});
    const int64_t first = t * kTileOutputs, count = std::min(kTileOutputs, out_features - first);
    for (int64_t j = 0; j < count; ++j) {
      const uint8_t* row = rows + (first + j) * bytes;
      for_channels(in_features, group_length, [&](int64_t k, int64_t step, int64_t c) {
        const int code = row[k / 2] >> (k % 2 * 4) & 15;
        tile[step * kStepBytes + step_byte(j, c)] |= static_cast<uint8_t>(code << step_shift(j));
      });
    }
  });
}

void untile_codes(const uint8_t* tiles, int64_t out_features, int64_t in_features, int64_t group_length, uint8_t* rows,
                  int threads) {
  const int64_t bytes = packed_bytes(in_features), tile_bytes = step_count(in_features, group_length) * kStepBytes;
  parallel_for(tile_count(out_features), threads, [&](int64_t t, int) {
    const uint8_t* tile = tiles + t * tile_bytes;
    const int64_t first = t * kTileOutputs, count = std::min(kTileOutputs, out_features - first);
    for (int64_t j = 0; j < count; ++j) {
      uint8_t* row = rows + (first + j) * bytes;
      std::fill(row, row + bytes, uint8_t{0});
      for_channels(in_features, group_length, [&](int64_t k, int64_t step, int64_t c) {
        const int code = tile[step * kStepBytes + step_byte(j, c)] >> step_shift(j) & 15;
        row[k / 2] |= static_cast<uint8_t>(code << (k % 2 * 4));
      });
    }
  });
}

void* allocate_large(int64_t bytes) {
  constexpr int64_t kLargePage = 2 << 20;
  void* data = nullptr;
  if (bytes < kLargePage || posix_memalign(&data, kLargePage, static_cast<size_t>(bytes)) != 0) return nullptr;
#if defined(__linux__)
  // Only advice: a system that refuses leaves everything as it was.
  (void)madvise(data, static_cast<size_t>(bytes / kLargePage * kLargePage), MADV_HUGEPAGE);
#endif
  return data;
}

void free_large(void* data) { std::free(data); }

}  // namespace awq
