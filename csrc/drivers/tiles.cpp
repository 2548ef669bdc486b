#include "drivers/tiles.h"

#include <algorithm>
#include <cstring>

#include "base/layout.h"
#include "base/parallel.h"

namespace awq {
namespace {

// Calls body(channel, step, place of the channel in its step) for all channels, group by group.
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

// Where groups hold whole steps, a step of a row is two bytes, and a step of a tile 16 words: four codes of output j
// and four of output 16 + j.
bool steps_are_bytes(int64_t in_features, int64_t group_length) {
  return in_features % 2 == 0 && (group_length % kStepChannels == 0 || group_length == in_features);
}

inline uint32_t join(uint32_t low, uint32_t high) {
  return (low & 0x0f0f) | (high & 0x0f0f) << 4 | (low & 0xf0f0) << 12 | (high & 0xf0f0) << 16;
}
inline uint16_t low_of(uint32_t word) { return static_cast<uint16_t>((word & 0x0f0f) | (word >> 12 & 0xf0f0)); }
inline uint16_t high_of(uint32_t word) { return static_cast<uint16_t>((word >> 4 & 0x0f0f) | (word >> 16 & 0xf0f0)); }

// Steps of a tile's rows that are transposed together: rows lie at strides that would share few sets of a cache.
constexpr int64_t kTurnSteps = 64;
using Turn = uint16_t[kTileOutputs][kTurnSteps];

void tile_steps(const uint8_t* rows, int64_t count, int64_t bytes, int64_t steps, uint8_t* tile) {
  for (int64_t first = 0; first < steps; first += kTurnSteps) {
    const int64_t size = std::min(kTurnSteps, steps - first), from = 2 * first;
    Turn turn = {};
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(turn[j], rows + j * bytes + from, static_cast<size_t>(std::min(2 * size, bytes - from)));
    for (int64_t s = 0; s < size; ++s) {
      uint32_t words[16];
      for (int64_t j = 0; j < 16; ++j) words[j] = join(turn[j][s], turn[16 + j][s]);
      std::memcpy(tile + (first + s) * kStepBytes, words, kStepBytes);
    }
  }
}

void untile_steps(const uint8_t* tile, int64_t count, int64_t bytes, int64_t steps, uint8_t* rows) {
  for (int64_t first = 0; first < steps; first += kTurnSteps) {
    const int64_t size = std::min(kTurnSteps, steps - first), from = 2 * first;
    Turn turn;
    for (int64_t s = 0; s < size; ++s) {
      uint32_t words[16];
      std::memcpy(words, tile + (first + s) * kStepBytes, kStepBytes);
      for (int64_t j = 0; j < 16; ++j) {
        turn[j][s] = low_of(words[j]);
        turn[16 + j][s] = high_of(words[j]);
      }
    }
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(rows + j * bytes + from, turn[j], static_cast<size_t>(std::min(2 * size, bytes - from)));
  }
}

}  // namespace

void tile_codes(const uint8_t* rows, int64_t out_features, int64_t in_features, int64_t group_length, uint8_t* tiles,
                int threads) {
  const int64_t bytes = packed_bytes(in_features), tile_bytes = step_count(in_features, group_length) * kStepBytes;
  parallel_for(tile_count(out_features), threads, [&](int64_t t, int) {
    uint8_t* tile = tiles + t * tile_bytes;
    const int64_t first = t * kTileOutputs, count = std::min(kTileOutputs, out_features - first);
    if (steps_are_bytes(in_features, group_length))
      return tile_steps(rows + first * bytes, count, bytes, tile_bytes / kStepBytes, tile);
    std::fill(tile, tile + tile_bytes, uint8_t{0});
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
    if (steps_are_bytes(in_features, group_length))
      return untile_steps(tile, count, bytes, tile_bytes / kStepBytes, rows + first * bytes);
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

}  // namespace awq
