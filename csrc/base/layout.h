// Sizes and layouts. N = out_features, K = in_features, g = channels in a full group, G = groups in a row.
//
// A weight row is cut into groups along K; the last may be short:
//
//     |<-- g -->|<-- g -->|<- K % g ->|        G = ceil(K / g), one scale and one zero each
//
// Packed codes: two per byte, the even channel in the low nibble, rows padded to whole bytes with 0:
//
//     byte            0               1                    ceil(K/2) - 1
//     bits        7..4 3..0       7..4 3..0         ...    7..4    3..0
//     channel       1    0          3    2                 (0)     K-1      (K odd)
//
// Compute layout, which the kernels of drivers/linear.h read and a QuantLinear holds. Outputs are cut into tiles of 32,
// channels into steps of 4; a step of a tile is 64 bytes, one cache line and one wide load. Every group begins with a
// new step, and tiles follow each other, so a product with few activation rows reads three arrays from one end to the
// other:
//
//     codes  [T][S][64]   T = ceil(N / 32) tiles, S = steps in a row: sum over groups of ceil(channels / 4)
//     scales [T][G][32]   two bytes each
//     zeros  [T][G][16]   four bits each: byte j holds output j low, output 16 + j high
//
// A step is 32 words of 16 bits. Word 2 j + r (j < 16, r < 2) belongs to outputs j and 16 + j of the tile:
//
//     bits         15..12      11..8       7..4       3..0
//     output       16 + j      j           16 + j     j
//     channel      2 + r       2 + r       r          r
//
// A mask then leaves sixteen outputs of two channel pairs in the bytes of a register, each pair in the order in which
// bf16 dot products take it. A shift by 4 b leaves one channel of sixteen outputs, one in each 32-bit lane. The padding
// of a last step or tile is 0, and is multiplied by activations that are 0.
#pragma once

#include <algorithm>
#include <cstdint>

namespace awq {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// group_size = -1 means one group per row, and a group is never longer than the row.
constexpr int64_t group_length(int64_t in_features, int64_t group_size) {
  return group_size == -1 ? in_features : std::min(group_size, in_features);
}

constexpr int64_t group_count(int64_t in_features, int64_t group_size) {
  return ceil_div(in_features, group_length(in_features, group_size));
}

constexpr int64_t packed_bytes(int64_t in_features) { return ceil_div(in_features, 2); }

constexpr int64_t kTileOutputs = 32, kStepChannels = 4, kStepBytes = 64, kTileZeroBytes = kTileOutputs / 2;

constexpr int64_t tile_count(int64_t out_features) { return ceil_div(out_features, kTileOutputs); }

// Steps in a row of groups of `length` channels, the last one perhaps shorter.
constexpr int64_t step_count(int64_t in_features, int64_t length) {
  return in_features / length * ceil_div(length, kStepChannels) + ceil_div(in_features % length, kStepChannels);
}

// Runs in the first `steps` of a row, which must end where a run does: each group is cut into runs of up to
// `run_steps`.
constexpr int64_t run_count(int64_t steps, int64_t length, int64_t run_steps) {
  const int64_t group_steps = ceil_div(length, kStepChannels);
  return steps / group_steps * ceil_div(group_steps, run_steps) + ceil_div(steps % group_steps, run_steps);
}

static_assert(step_count(576, 128) == 144 && step_count(13, 7) == 4 && step_count(13, 13) == 4 && tile_count(33) == 2);
static_assert(group_count(576, 128) == 5 && group_count(7, -1) == 1 && packed_bytes(13) == 7);
static_assert(run_count(144, 128, 64) == 5 && run_count(275, 1100, 64) == 5 && run_count(256, 1100, 64) == 4);

}  // namespace awq
