#include "drivers/tiles.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

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

// Where output j of the tile, channel c of the step is: byte in the step, and shift in the byte.
template <int Bits>
constexpr int64_t step_byte(int64_t j, int64_t c) {
  return 4 * (Bits == 8 ? j : j % 16) + 2 * (c % 2) + c / 2;
}
template <int Bits>
constexpr int step_shift(int64_t j) {
  return Bits == 8 || j < 16 ? 0 : 4;
}
// Likewise channel k in its row.
template <int Bits>
constexpr int64_t row_byte(int64_t k) {
  return Bits == 8 ? k : k / 2;
}
template <int Bits>
constexpr int row_shift(int64_t k) {
  return Bits == 8 ? 0 : static_cast<int>(k % 2 * 4);
}

// Where groups hold whole steps, a step of a row is two or four bytes, which are moved together.
template <int Bits>
using RowStep = std::conditional_t<Bits == 8, uint32_t, uint16_t>;

template <int Bits>
bool steps_are_bytes(int64_t in_features, int64_t group_length) {
  return (Bits == 8 || in_features % 2 == 0) && (group_length % kStepChannels == 0 || group_length == in_features);
}

inline uint32_t join(uint32_t low, uint32_t high) {
  return (low & 0x0f0f) | (high & 0x0f0f) << 4 | (low & 0xf0f0) << 12 | (high & 0xf0f0) << 16;
}
inline uint16_t low_of(uint32_t word) { return static_cast<uint16_t>((word & 0x0f0f) | (word >> 12 & 0xf0f0)); }
inline uint16_t high_of(uint32_t word) { return static_cast<uint16_t>((word >> 4 & 0x0f0f) | (word >> 16 & 0xf0f0)); }
// Channels 0, 1, 2, 3 <-> 0, 2, 1, 3.
inline uint32_t swap_middle(uint32_t word) {
  return (word & 0xff0000ff) | (word >> 8 & 0x0000ff00) | (word << 8 & 0x00ff0000);
}

// Steps of a tile's rows that are transposed together: rows lie at strides that would share few sets of a cache.
constexpr int64_t kTurnSteps = 64;
template <int Bits>
using Turn = RowStep<Bits>[kTileOutputs][kTurnSteps];

// The words of one step of the tile.
template <int Bits>
void to_words(const Turn<Bits>& turn, int64_t s, uint32_t* words) {
  if constexpr (Bits == 8)
    for (int64_t j = 0; j < kTileOutputs; ++j) words[j] = swap_middle(turn[j][s]);
  else
    for (int64_t j = 0; j < 16; ++j) words[j] = join(turn[j][s], turn[16 + j][s]);
}

template <int Bits>
void from_words(const uint32_t* words, int64_t s, Turn<Bits>& turn) {
  if constexpr (Bits == 8) {
    for (int64_t j = 0; j < kTileOutputs; ++j) turn[j][s] = swap_middle(words[j]);
  } else {
    for (int64_t j = 0; j < 16; ++j) {
      turn[j][s] = low_of(words[j]);
      turn[16 + j][s] = high_of(words[j]);
    }
  }
}

template <int Bits>
void tile_steps(const uint8_t* rows, int64_t count, int64_t bytes, int64_t steps, uint8_t* tile) {
  constexpr int64_t kSize = sizeof(RowStep<Bits>);
  for (int64_t first = 0; first < steps; first += kTurnSteps) {
    const int64_t size = std::min(kTurnSteps, steps - first), from = kSize * first;
    Turn<Bits> turn = {};
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(turn[j], rows + j * bytes + from, static_cast<size_t>(std::min(kSize * size, bytes - from)));
    for (int64_t s = 0; s < size; ++s) {
      uint32_t words[step_bytes(Bits) / 4];
      to_words<Bits>(turn, s, words);
      std::memcpy(tile + (first + s) * step_bytes(Bits), words, step_bytes(Bits));
    }
  }
}

template <int Bits>
void untile_steps(const uint8_t* tile, int64_t count, int64_t bytes, int64_t steps, uint8_t* rows) {
  constexpr int64_t kSize = sizeof(RowStep<Bits>);
  for (int64_t first = 0; first < steps; first += kTurnSteps) {
    const int64_t size = std::min(kTurnSteps, steps - first), from = kSize * first;
    Turn<Bits> turn;
    for (int64_t s = 0; s < size; ++s) {
      uint32_t words[step_bytes(Bits) / 4];
      std::memcpy(words, tile + (first + s) * step_bytes(Bits), step_bytes(Bits));
      from_words<Bits>(words, s, turn);
    }
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(rows + j * bytes + from, turn[j], static_cast<size_t>(std::min(kSize * size, bytes - from)));
  }
}

// Rows of one tile.
struct TileRows {
  int64_t count, in_features, group_length, bytes, steps;
};

template <int Bits>
void tile_rows(const TileRows& r, const uint8_t* rows, uint8_t* tile) {
  if (steps_are_bytes<Bits>(r.in_features, r.group_length))
    return tile_steps<Bits>(rows, r.count, r.bytes, r.steps, tile);
  std::fill(tile, tile + r.steps * step_bytes(Bits), uint8_t{0});
  for (int64_t j = 0; j < r.count; ++j) {
    const uint8_t* row = rows + j * r.bytes;
    for_channels(r.in_features, r.group_length, [&](int64_t k, int64_t step, int64_t c) {
      const int code = row[row_byte<Bits>(k)] >> row_shift<Bits>(k) & ((1 << Bits) - 1);
      tile[step * step_bytes(Bits) + step_byte<Bits>(j, c)] |= static_cast<uint8_t>(code << step_shift<Bits>(j));
    });
  }
}

template <int Bits>
void untile_rows(const TileRows& r, const uint8_t* tile, uint8_t* rows) {
  if (steps_are_bytes<Bits>(r.in_features, r.group_length))
    return untile_steps<Bits>(tile, r.count, r.bytes, r.steps, rows);
  std::fill(rows, rows + r.count * r.bytes, uint8_t{0});
  for (int64_t j = 0; j < r.count; ++j) {
    uint8_t* row = rows + j * r.bytes;
    for_channels(r.in_features, r.group_length, [&](int64_t k, int64_t step, int64_t c) {
      const int byte = tile[step * step_bytes(Bits) + step_byte<Bits>(j, c)];
      row[row_byte<Bits>(k)] |=
          static_cast<uint8_t>((byte >> step_shift<Bits>(j) & ((1 << Bits) - 1)) << row_shift<Bits>(k));
    });
  }
}

// Calls body(sizes, offset of the rows, offset of the tile) for all tiles.
template <class Body>
void for_tiles(int64_t out_features, int64_t in_features, int64_t group_length, int bits, int threads,
               const Body& body) {
  const int64_t bytes = row_bytes(in_features, bits), steps = step_count(in_features, group_length);
  parallel_for(tile_count(out_features), threads, [&](int64_t t, int) {
    const int64_t first = t * kTileOutputs, count = std::min(kTileOutputs, out_features - first);
    body(TileRows{count, in_features, group_length, bytes, steps}, first * bytes, t * steps * step_bytes(bits));
  });
}

}  // namespace

void tile_codes(const uint8_t* rows, int64_t out_features, int64_t in_features, int64_t group_length, int bits,
                uint8_t* tiles, int threads) {
  const auto convert = bits == 8 ? &tile_rows<8> : &tile_rows<4>;
  for_tiles(out_features, in_features, group_length, bits, threads,
            [&](const TileRows& r, int64_t row, int64_t tile) { convert(r, rows + row, tiles + tile); });
}

void untile_codes(const uint8_t* tiles, int64_t out_features, int64_t in_features, int64_t group_length, int bits,
                  uint8_t* rows, int threads) {
  const auto convert = bits == 8 ? &untile_rows<8> : &untile_rows<4>;
  for_tiles(out_features, in_features, group_length, bits, threads,
            [&](const TileRows& r, int64_t row, int64_t tile) { convert(r, tiles + tile, rows + row); });
}

}  // namespace awq
