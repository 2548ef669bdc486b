// Between the rows of a checkpoint and the tiles of the compute layout (layout.h), exactly, both ways.
#pragma once

#include <cstdint>

namespace awq {

// rows [N, ceil(K / 2)] <-> tiles [T][S][64]. Tiles are written whole, with 0 where they hold no code.
void tile_codes(const uint8_t* rows, int64_t out_features, int64_t in_features, int64_t group_length, uint8_t* tiles,
                int threads);
void untile_codes(const uint8_t* tiles, int64_t out_features, int64_t in_features, int64_t group_length, uint8_t* rows,
                  int threads);

// Memory for what will be streamed for long, in large pages where the system has them: a product with one row then
// misses no address translations, a tenth of its time. Begins with such a page, so that few bytes at its end are
// outside. Null if it is too small for one, or there is no memory. To be released by free_large.
void* allocate_large(int64_t bytes);
void free_large(void* data);

}  // namespace awq
