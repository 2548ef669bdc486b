// Sizes and layouts. N = out_features, K = in_features, g = channels in a full group, G = groups in a row.
//
// A weight row is cut into groups along K; the last may be short:
//
//     |<-- g -->|<-- g -->|<- K % g ->|        G = ceil(K / g), one scale and one zero each
//
// Rows, as checkpoints have them. Codes of 8 bits: one per byte. Codes of 4 bits: two per byte, the even channel in the
// low nibble, rows padded to whole bytes with 0:
//
//     byte            0               1                    ceil(K/2) - 1
//     bits        7..4 3..0       7..4 3..0         ...    7..4    3..0
//     channel       1    0          3    2                 (0)     K-1      (K odd)
//
// Compute layout, which the kernels of drivers/linear.h read and a QuantLinear holds. Outputs are cut into tiles of 32,
// channels into steps of 4; a step of a tile is one cache line of 64 bytes, or two for 8 bits, and each is one wide
// load. Every group begins with a new step, and tiles follow each other, so a product with few activation rows reads
// three arrays from one end to the other. With B bits a code, 4 or 8:
//
//     codes  [T][S][16 B]  T = ceil(N / 32) tiles, S = steps in a row: sum over groups of ceil(channels / 4)
//     scales [T][G][32]    two bytes each
//     zeros  [T][G][4 B]   B bits each; for 4 bits byte j holds output j low, output 16 + j high
//
// The weight takes T (16 B S + (64 + 4 B) G) bytes.
//
// A step of 8 bits is 32 words of 32 bits. Word j belongs to output j of the tile:
//
//     bits         31..24      23..16      15..8      7..0
//     channel      3           1           2          0
//
// A step of 4 bits is 16 such words. Word j belongs to outputs j (low nibbles) and 16 + j (high nibbles), with the
// channels in the same order, so a mask and a shift leave the two halves of a step of 8 bits. Seen as words of 16 bits,
// a half holds its even channels 0 and 1 in even bytes, and 2 and 3 in odd ones: pairs in the order in which bf16 dot
// products take them. A shift by whole bytes leaves one channel of sixteen outputs, one in each 32-bit lane. The
// padding of a last step or tile is 0, and is multiplied by activations that are 0.
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
// Bytes of the codes of a row, for 4 or 8 bits.
constexpr int64_t row_bytes(int64_t in_features, int bits) {
  return bits == 8 ? in_features : packed_bytes(in_features);
}

constexpr int64_t kTileOutputs = 32, kStepChannels = 4;
// Codes of a step of a tile, and zeros of a group of a tile.
constexpr int64_t step_bytes(int bits) { return kTileOutputs * kStepChannels * bits / 8; }
constexpr int64_t tile_zero_bytes(int bits) { return kTileOutputs * bits / 8; }

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
static_assert(step_bytes(4) == 64 && step_bytes(8) == 128 && tile_zero_bytes(4) == 16 && row_bytes(13, 8) == 13);
static_assert(run_count(144, 128, 64) == 5 && run_count(275, 1100, 64) == 5 && run_count(256, 1100, 64) == 4);

}  // namespace awq
