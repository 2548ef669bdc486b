// Every body once, inside the anonymous namespace of the level's file, and the table that names them. Nothing here may
// have external linkage: of two copies of an inline function the linker keeps one, perhaps one that older processors
// cannot run.

namespace awq {
namespace {

#include "simd-inl.h"  // first: the others use its vectors
//
#include "convert-inl.h"
#include "gemm-inl.h"
#include "int4-inl.h"
#include "learned-inl.h"
#include "pack-inl.h"
#include "quantize-inl.h"
#include "tile-inl.h"
//
#include "decode-bf16-inl.h"
#include "factor-inl.h"     // uses gemm-inl.h
#include "gptq-inl.h"       // uses gemm-inl.h and quantize-inl.h
#include "tile-bf16-inl.h"  // these two use tile-inl.h
#include "tile-int8-inl.h"
#if defined(AWQ_LEVEL_AMX) || defined(AWQ_LEVEL_AMX_EMULATED)
#include "amx-tiles-inl.h"
//
#include "gemm-amx-inl.h"        // these use amx-tiles-inl.h, this one gptq-inl.h too,
#include "tile-amx-forms-inl.h"  // and this one tile-inl.h, tile-bf16-inl.h and tile-int8-inl.h
//
#include "tile-amx-beside-inl.h"  // uses tile-amx-forms-inl.h
#include "tile-amx-inl.h"         // uses both
#endif

static_assert(kRows <= kMaxTileRows && kDotRows <= kMaxDotRows, "drivers have no room for more rows: see kernels.h");
static_assert(kWidth <= kMaxTileCols && kMaxTileCols % kWidth == 0,
              "drivers have no room for such tiles: see kernels.h");
static_assert(kDotRows <= kRows, "interleave takes kRows rows at most");

#if defined(AWQ_LEVEL_AMX) || defined(AWQ_LEVEL_AMX_EMULATED)
constexpr TileProducts kTilesBf16 = tile_products<TileBf16>(), kTilesInt8 = tile_products<TileInt8>();
constexpr Bf16Products kBf16Products = tile_matrix_products();
#elif defined(AWQ_LEVEL_BF16)
inline void no_state() {}
constexpr Bf16Products kBf16Products = {kRows,
                                        kWidth,
                                        2,
                                        no_state,
                                        no_state,
                                        gemm_tile_bf16,
                                        quadratic_tile_bf16,
                                        pack_pairs<kRows>,
                                        pack_pairs<kWidth>,
                                        pack_row_pairs,
                                        nullptr,
                                        nullptr};
#endif
#if defined(AWQ_LEVEL_AMX) || defined(AWQ_LEVEL_AMX_EMULATED) || defined(AWQ_LEVEL_BF16)
static_assert(kBf16Products.rows <= kMaxTileRows && kBf16Products.cols <= kMaxTileCols &&
                  kMaxTileCols % kBf16Products.cols == 0 && kBf16Products.cols % kBf16Products.depth == 0,
              "drivers have no room for such tiles: see kernels.h");
#endif

constexpr KernelTable make_table() {
  KernelTable table{};
#if defined(AWQ_LEVEL_AMX) || defined(AWQ_LEVEL_AMX_EMULATED)
  table.tiles_bf16 = &kTilesBf16;
  table.tiles_int8 = &kTilesInt8;
  table.keep_tiles = keep_tiles;
#endif
#if defined(AWQ_LEVEL_AMX) || defined(AWQ_LEVEL_AMX_EMULATED) || defined(AWQ_LEVEL_BF16)
  table.bf16_products = &kBf16Products;
#endif
  table.to_float = to_float;
  table.from_float = from_float;
  table.multiply = multiply;
  table.group_range = group_range;
  table.quantize_group = quantize_group;
  table.dequantize_group = dequantize_group;
  table.group_error = group_error;
  table.gptq_panel = gptq_panel;
  table.solve_rows = solve_rows;
  table.learned_group = learned_group;
  table.move_group = move_group;
  table.round_to_bf16 = round_to_bf16;
  table.pack_int4 = pack_int4;
  table.unpack_int4 = unpack_int4;
  table.dot_rows = kDotRows;
  table.dot_f32 = dot_f32;
  table.dot_bf16 = dot_bf16;
  table.quantize_int8 = quantize_int8;
  table.dot_int8 = dot_int8;
  table.panel_values = panel_values;
  table.panel_f32 = panel_f32;
  table.interleave = interleave;
  table.add_sums = add_sums;
  table.add_weighted_sums = add_weighted_sums;
  table.tile_rows = kRows;
  table.tile_cols = kWidth;
  table.gemm_tile = gemm_tile;
  table.quadratic_tile = quadratic_tile;
  table.pack_columns = pack_columns;
  table.pack_rows = pack_rows;
  return table;
}

}  // namespace
}  // namespace awq
