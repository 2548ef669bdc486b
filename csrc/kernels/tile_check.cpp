#include "kernels/tile_check.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/layout.h"

namespace awq {
namespace {

// A weight of two groups and activations for it, in the form that TileProducts takes.
struct Problem {
  std::vector<uint8_t> codes, zeros;
  std::vector<uint16_t> scales;
  std::vector<uint32_t> activations;
  WeightBlock block;
  int rows;
};

// The same numbers at every call.
uint32_t next(uint32_t& state) { return state = state * 1664525u + 1013904223u; }

// A pair of small integers in bf16, or four bytes of both signs.
uint32_t element(bool pairs, uint32_t& state) {
  if (!pairs) return next(state) & 0xbfbfbfbf;
  const auto half = [&] {
    const float value = static_cast<float>(next(state) >> 28) - 7.0f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits >> 16;
  };
  const uint32_t low = half();
  return low | half() << 16;
}

Problem make(const TileProducts& tiles, bool pairs, int64_t steps, int rows) {
  constexpr int64_t kGroups = 2, kSide = kTileBlockRows;
  uint32_t state = static_cast<uint32_t>(steps * 64 + rows);
  Problem p;
  p.rows = rows;
  p.codes.resize(static_cast<size_t>(kGroups * steps * step_bytes(4)));
  p.zeros.resize(static_cast<size_t>(kGroups * tile_zero_bytes(4)));
  for (uint8_t& byte : p.codes) byte = static_cast<uint8_t>(next(state) >> 24);
  for (uint8_t& byte : p.zeros) byte = static_cast<uint8_t>(next(state) >> 24);
  p.scales.assign(static_cast<size_t>(kGroups * kTileOutputs), 0x3f80);  // 1 in bf16
  const int64_t halves = rows > kSide ? 2 : 1, words = steps * tiles.step_words, depth = std::min(kSide, words);
  for (int64_t g = 0; g < kGroups; ++g) {
    if (!pairs) {
      for (int64_t m = 0; m < halves * kSide; ++m) p.activations.push_back(next(state) >> 24);  // minus sums
      p.activations.insert(p.activations.end(), static_cast<size_t>(halves * kSide), 0x3f800000u);
    }
    for (int64_t t = 0; t < ceil_div(words, depth); ++t)
      for (int64_t m = 0; m < halves * kSide; ++m)
        for (int64_t i = 0; i < kSide; ++i)
          p.activations.push_back(i < depth && t * depth + i < words ? element(pairs, state) : 0);
  }
  p.block = {p.codes.data(), p.scales.data(), p.zeros.data(), Dtype::bf16, kGroups, steps, steps, 4};
  return p;
}

// Products decoded on the way, then those decoded before.
std::vector<float> products(const TileProducts& tiles, const Problem& p) {
  const size_t size = static_cast<size_t>(p.rows * kTileOutputs);
  std::vector<float> y(2 * size);
  std::vector<uint32_t> values(
      static_cast<size_t>(2 * p.block.groups * p.block.group_steps * tiles.step_words * kTileOutputs));
  tiles.begin(p.block.group_steps);
  const TileRows first{p.activations.data(), p.rows, y.data()}, second{p.activations.data(), p.rows, y.data() + size};
  tiles.dot(&p.block, &first);
  tiles.values(&p.block, values.data());
  tiles.panel(&p.block, values.data(), &second, 1);
  tiles.end();
  return y;
}

bool agree(const TileProducts& one, const TileProducts& other, bool pairs) {
  for (const int64_t steps : {1, 5, 24})
    for (const int rows : {7, 27}) {
      const Problem problem = make(one, pairs, steps, rows);
      if (products(one, problem) != products(other, problem)) return false;
    }
  return true;
}

}  // namespace

bool tiles_agree(const KernelTable& table, const KernelTable& other) {
  return agree(*table.tiles_bf16, *other.tiles_bf16, true) && agree(*table.tiles_int8, *other.tiles_int8, false);
}

}  // namespace awq
