// Exact conversion between the rows of a checkpoint and the tiles of the compute layout (base/layout.h).
#pragma once

#include <cstdint>

namespace awq {

// rows [N, row_bytes(K, bits)] <-> tiles [T][S][step_bytes(bits)], bits 4 or 8. Tiles are written whole, with 0 where
// they hold no code.
void tile_codes(const uint8_t* rows, int64_t out_features, int64_t in_features, int64_t group_length, int bits,
                uint8_t* tiles, int threads);
void untile_codes(const uint8_t* tiles, int64_t out_features, int64_t in_features, int64_t group_length, int bits,
                  uint8_t* rows, int threads);

}  // namespace awq
