// Sizes and layouts, described once. N = out_features, K = in_features, g = channels in a full group, G = groups in a
// row.
//
// A weight row is cut into groups along K; the last may be short:
//
//     |<-- g -->|<-- g -->|<- K % g ->|        G = ceil(K / g), one scale and one zero each
//
// Packed codes: two a byte, the even channel in the low nibble, rows padded to whole bytes with 0:
//
//     byte            0               1                    ceil(K/2) - 1
//     bits        7..4 3..0       7..4 3..0         ...    7..4    3..0
//     channel       1    0          3    2                 (0)     K-1      (K odd)
#pragma once

#include <algorithm>
#include <cstdint>

namespace awq {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// group_size = -1 means one group a row, and a group is never longer than the row.
constexpr int64_t group_length(int64_t in_features, int64_t group_size) {
  return group_size == -1 ? in_features : std::min(group_size, in_features);
}

constexpr int64_t group_count(int64_t in_features, int64_t group_size) {
  return ceil_div(in_features, group_length(in_features, group_size));
}

constexpr int64_t packed_bytes(int64_t in_features) { return ceil_div(in_features, 2); }

static_assert(group_count(576, 128) == 5 && group_count(7, -1) == 1 && packed_bytes(13) == 7);

}  // namespace awq
