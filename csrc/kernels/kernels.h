// The contract between the drivers and the kernels: one table of function pointers per instruction set.
//
// Kernels see pointers and sizes, nothing else: no torch, no allocation, no threads, no exceptions. Unless a comment
// says otherwise, sizes count elements, buffers need only their element's alignment, and inputs and outputs do not
// overlap. All integer results (codes, packed bytes, 16-bit patterns) are the same at every level, bit for bit.
#pragma once

#include <cstdint>

namespace awq {

enum class Dtype { f32, f16, bf16 };

constexpr int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

// Limits of a level's tiles (tile_rows, tile_cols, those of Bf16Products) and of dot_rows, because drivers keep tiles
// on the stack. table-inl.h checks each level; the columns of a tile must also divide kMaxTileCols.
constexpr int kMaxTileRows = 32, kMaxTileCols = 32, kMaxDotRows = 12;
constexpr int kMaxTile = kMaxTileRows * kMaxTileCols;

// The range of a group's weights. lo <= 0 <= hi, because 0 must be among the quantized values. NaN is ignored.
struct Range {
  float lo;
  float hi;
  float first;    // the group's first weight
  bool constant;  // all weights equal and not 0: stored exactly, as the code one above or below zero's
};

// How a group is rounded: code = clamp(round(w / step) + zero, 0, top), value = (code - zero) * step.
struct Grid {
  float step;           // never 0, already rounded to the scale's storage type
  float zero;           // an integer in [0, top]
  float top;            // 2^bits - 1
  uint16_t scale_bits;  // step in its storage type
};

// Whole groups of one tile of 32 outputs, or a part of one group.
struct WeightBlock {
  const uint8_t* codes;
  const uint16_t* scales;  // bit patterns of scale_dtype, 32 per group
  const uint8_t* zeros;    // 4 * bits bytes per group
  Dtype scale_dtype;       // f16 or bf16
  int64_t groups;
  int64_t group_steps;  // of 4 channels, in every group but the last
  int64_t last_steps;
  int bits;  // 4 or 8
};

// Activations in eight bits: x ~ q * scale for the channels of one run, |q| <= 127.
struct Int8Run {
  float scale;
  int32_t sum;  // of q
};

// The most steps of 4 channels in a run, which is a group or a part of one. 256 channels keep the sums of a run, of
// products up to 255 * 127, below 2^24, exact in fp32, whatever the group size.
constexpr int64_t kRunSteps = 64;
// The most steps whose sums stay in tile registers: a group, or a part of a long one. Decoded to bf16, 32 outputs of
// them take a third of a first-level cache of 48 KiB.
constexpr int64_t kTileRunSteps = 64;
// Rows of activations in a tile, and in the two that a product takes.
constexpr int kTileBlockRows = 16, kMostTileRows = 32;

// Rows that add_sums reads at a time: sums are loaded and stored once for all of them.
constexpr int kSumRows = 8;

// Columns of a Cholesky factor that are finished at a time: a multiple of every level's tile_cols, and few enough that
// the triangular solve, which is not done by tiles, stays a small share.
constexpr int kFactorBlock = 64;

// One panel of at most tile_rows channels, to be rounded with error feedback, tile_cols weight rows at a time (or the
// rows and columns of Bf16Products): for each channel or group the arrays hold one value for each of these rows.
struct GptqPanel {
  int channels;
  const float* factor;    // [channels][tile_rows], the panel's diagonal block: entry [c][later]
  const float* weights;   // [channels][tile_cols]
  const float* steps;     // [groups][tile_cols]
  const float* zeros;     // [groups][tile_cols]
  const int64_t* order;   // [channels], the channel's place in the weight row
  const int64_t* groups;  // [channels], its group there
  float top;
  bool again;  // channels have errors from an earlier round: those of later channels are fed back to earlier ones
};

// Activations for products on tile registers, and where the products go.
//
// For one or two halves of 16 rows: for each run, after a header of [2][halves][16] words with -sum and scale of each
// row where activations have eight bits, tiles of [16 rows][16 words], all halves of a tile one after the other. The
// first `depth` words of a tile's row hold consecutive elements of the run, depth = min(16, elements in a whole group);
// elements past the run's end, and rows that are not there, are 0.
struct TileRows {
  const uint32_t* a;
  int rows;  // <= kMostTileRows
  float* y;  // [rows][32]
};

// Products with weights of 4 or 8 bits on tile registers, bodies in kernels/tile-amx-inl.h. They add to y as those of
// KernelTable do, with the same exact weights and 32-bit sums.
struct TileProducts {
  int step_words;     // elements in a step: 2 pairs of bf16, or 1 word of four bytes
  int64_t run_steps;  // of a run, which is a group or a part of one
  // Around the calls in one thread for weights with groups of so many steps. Between the two, nothing else may use the
  // thread's tile registers.
  void (*begin)(int64_t group_steps);
  void (*end)();
  // Decodes on the way: every code is read once.
  void (*dot)(const WeightBlock* block, const TileRows* rows);
  // Decodes to rows of 32 words for each element, runs padded to whole tiles; and the products of such rows.
  void (*values)(const WeightBlock* block, uint32_t* values);
  void (*panel)(const WeightBlock* block, const uint32_t* values, const TileRows* rows, int64_t count);
};

// Matrix products of bf16 factors, on panels of their own but otherwise like gemm_tile and quadratic_tile of
// KernelTable. Products are exact in fp32, sums are fp32; subnormal inputs and results count as 0.
//
// Where the level has `split`, a number may be held as up to three bf16 that add up to it, its terms. Both factors then
// have as many, and of the products t_i u_j those with i + j <= 4 are added up: 1, 4 or 6. Rounding to nearest makes
// t_2 at most 2^-8 of the number, t_3 at most 2^-17, and nothing is left after three. So the products left out, mostly
// t_2 u_3 and t_3 u_2, are 2^-24 of x y at most, what one fp32 product is off by. (Terms cut off towards 0 reach 2^-7
// and 2^-15, and would leave out eight times as much.) Three terms hold every fp32, two every fp16.
struct Bf16Products {
  int rows, cols;  // of a tile
  int depth;       // the k that are packed at a time: a panel's k is a multiple of it
  // Around all calls of gemm and quadratic in one thread. Between the two, nothing else may use its tile registers.
  void (*begin)();
  void (*end)();
  // a: for every `depth` of k, for every term, [depth][rows] numbers in an order of the level's own; b likewise, with
  // cols. So parts of a panel whose k is a multiple of depth are panels.
  void (*gemm)(const uint16_t* a, const uint16_t* b, int64_t k, int terms, float* c, int64_t ldc);
  void (*quadratic)(const uint16_t* a, const uint16_t* b, int64_t k, int terms, const float* e, int64_t lde,
                    double* out);
  // One term of a panel of several, at its place in the first `depth` of k. Columns [0, cols) of `k` rows of x (row
  // stride ldx); other columns, and rows up to a multiple of depth, are 0.
  void (*pack_left)(const uint16_t* x, int64_t ldx, int64_t k, int64_t cols, int terms, uint16_t* out);
  void (*pack_right)(const uint16_t* x, int64_t ldx, int64_t k, int64_t cols, int terms, uint16_t* out);
  // All terms of a left panel, from `rows` rows of x, k values each. One term is the upper half of each fp32: the
  // caller has rounded it.
  void (*pack_rows)(const float* x, int64_t ldx, int64_t k, int terms, uint16_t* out);
  // Takes the next term off each x: term[i] = x[i] rounded to bf16, half to even, and x[i] = what is left of it,
  // exactly. Towards 0 where rounding would overflow; of what is not finite, nothing is left. Null where more than one
  // term is no faster than fp32.
  void (*split)(float* x, int64_t n, uint16_t* term);
  // KernelTable's for panels of this shape: up to `rows` channels, of `cols` weight rows. Null where split is.
  void (*gptq_panel)(const GptqPanel* panel, float* sums, float* errors, uint8_t* codes);
};

// A group of codes that gradients move: the largest code, zero and scale of the group, and what its row is multiplied
// by.
struct LearnedGroup {
  float top, zero, scale, divisor;
};

struct KernelTable {
  // dst[i] = (float)src[i], exact, subnormals included.
  void (*to_float)(const void* src, Dtype dtype, int64_t n, float* dst);
  // dst[i] = src[i] rounded to dtype, half to even.
  void (*from_float)(const float* src, Dtype dtype, int64_t n, void* dst);
  // out[i] = a[i] * b[i]; out may be a.
  void (*multiply)(const float* a, const float* b, int64_t n, float* out);

  // n >= 1 weights of one group.
  Range (*group_range)(const float* w, int64_t n);
  void (*quantize_group)(const float* w, int64_t n, const Grid* grid, uint8_t* codes);
  // out = (code - zero) * step.
  void (*dequantize_group)(const uint8_t* codes, int64_t n, float step, float zero, float* out);
  // error = dequantized(round(scaled)) / channel_scale - w, in the space of the weights before scaling. channel_scale
  // may be null.
  void (*group_error)(const float* scaled, const float* w, const float* channel_scale, int64_t n, const Grid* grid,
                      float* error);
  // Channel c is rounded from weights[c] + sums[c] / factor[c][c]. Its error, weights[c] - value, is written to
  // errors[c] and, times factor[c][later], added to sums[later]. With `again`, the old errors[later], times
  // factor[c][later], are added to sums[c] first. sums, errors [channels][tile_cols]; codes [all channels][tile_cols],
  // in the weight row's order.
  void (*gptq_panel)(const GptqPanel* panel, float* sums, float* errors, uint8_t* codes);
  // x = x R^-T in place for at most tile_cols rows x [rows][size], R upper triangular, size <= kFactorBlock; factor: R,
  // column after column, kFactorBlock apart.
  void (*solve_rows)(const float* factor, int size, float* x, int64_t ldx, int rows);
  // Rounds x[i] to bf16, half to even, stored in fp32. A finite value becomes infinite only above bf16's range.
  void (*round_to_bf16)(float* x, int64_t n);

  // out = (code - zero) * scale / channel_scale * divisor, the code being start + moved rounded half to even and
  // clamped to 0 .. top. channel_scale may be null.
  void (*learned_group)(const float* start, const float* moved, const float* channel_scale, int64_t n,
                        const LearnedGroup* group, float* out);
  // moved -= step * sign(slope), kept within +-reach; NaN has the sign 0. Returns the sum of slope * weight, in fp32
  // and in an order of the level's own.
  float (*move_group)(const float* slope, const float* weight, int64_t n, float step, float reach, float* moved);

  // n codes below 16 <-> ceil(n / 2) bytes: see base/layout.h. Packing returns the bitwise or of all codes: if that is
  // above 15, a code did not fit.
  uint8_t (*pack_int4)(const uint8_t* codes, int64_t n, uint8_t* packed);
  void (*unpack_int4)(const uint8_t* packed, int64_t n, uint8_t* codes);

  // Products with weights of 4 or 8 bits in the compute layout of base/layout.h. Activations come interleaved: a[i *
  // rows + m] is element i of row m, an element being an fp32 number or (dot_bf16) a pair of bf16, with zeros where a
  // group's last step is not full. y is [rows][32] at row stride ldy; all of these add to it, group by group:
  //   y[m][n] += scale * sum over the group's channels of (code - zero) * a.
  // code - zero, within +-255, is exact in bf16; products of bf16 are exact in fp32, sums are fp32.
  //
  // Two that decode codes in registers, rows <= dot_rows. dot_bf16 is null where the level has no such instruction; it
  // treats subnormal inputs and results as 0.
  int dot_rows;
  void (*dot_f32)(const WeightBlock* block, const float* a, int rows, float* y, int64_t ldy);
  void (*dot_bf16)(const WeightBlock* block, const uint16_t* a, int rows, float* y, int64_t ldy);
  // The same with activations in eight bits and exact 32-bit sums: y[m][n] += weight scale * activation scale * sum,
  // run by run. quantize_int8 rounds n <= 4 * kRunSteps numbers, q = round(x / scale), scale = max(max |x| / 127,
  // 2^-126), and writes four per step in the order 0, 2, 1, 3, padded with 0. If any x is infinite or NaN, so is the
  // scale, and q is 0. For each run of a row dot_int8 reads 2 elements, -sum and scale, and then the run's steps,
  // interleaved as above.
  Int8Run (*quantize_int8)(const float* x, int64_t n, uint32_t* steps, float* rest);
  void (*dot_int8)(const WeightBlock* block, const uint32_t* a, int rows, float* y, int64_t ldy);
  // panel_values decodes code - zero to fp32 [channels][32]; panel_f32 computes the products from such values, rows <=
  // tile_rows. Of the block it reads only scales and group sizes.
  void (*panel_values)(const WeightBlock* block, float* values);
  void (*panel_f32)(const WeightBlock* block, const float* values, const float* a, int rows, float* y, int64_t ldy);
  // The same on tile registers, activations in pairs of bf16 or in eight bits; null where the level has none.
  const TileProducts* tiles_bf16;
  const TileProducts* tiles_int8;
  // Fills the thread's tile registers, calls meanwhile(argument), and tells whether they still hold what they did.
  bool (*keep_tiles)(void (*meanwhile)(void*), void* argument);
  // out[i * rows + m] = x[m * ldx + i], elements of 4 bytes; x need only be aligned to 2 bytes.
  void (*interleave)(const void* x, int64_t ldx, int64_t n, int rows, void* out);

  // sum[i] += x[r][i] and abs_sum[i] += |x[r][i]| for r < kSumRows, one row after another; x: [kSumRows][n].
  void (*add_sums)(const float* x, int64_t n, double* sum, double* abs_sum);
  // The same for weighted rows: sum[i] += weights[r] * x[r][i], with exact products in fp64, and abs_sum[i] +=
  // |roots[r]
  // * x[r][i]|, with products rounded to fp32; weights, roots: [kSumRows].
  void (*add_weighted_sums)(const float* x, const float* weights, const float* roots, int64_t n, double* sum,
                            double* abs_sum);

  // Matrix products run on packed panels. A tile is tile_rows x tile_cols outputs and lives in registers.
  //   a: [k][tile_rows], b: [k][tile_cols]
  int tile_rows;
  int tile_cols;  // even
  // C[m * ldc + n] += sum over k of a[k][m] * b[k][n], by fp32 FMA (scalar level: product, then sum).
  void (*gemm_tile)(const float* a, const float* b, int64_t k, float* c, int64_t ldc);
  // out[m] += sum over n of (sum over k of a[k][m] * b[k][n]) * e[m * lde + n]: a bilinear form, the product never
  // stored.
  void (*quadratic_tile)(const float* a, const float* b, int64_t k, const float* e, int64_t lde, double* out);
  // The same with bf16 factors; null where the level has no fast products of these.
  const Bf16Products* bf16_products;

  // Columns [0, cols) of `rows` rows of x (row stride ldx) as a panel [rows][width], the rest 0.
  void (*pack_columns)(const float* x, int64_t ldx, int64_t rows, int64_t cols, int64_t width, float* out);
  // `tile_rows` rows of x, k values each, as a panel [k][tile_rows].
  void (*pack_rows)(const float* x, int64_t ldx, int64_t k, float* out);
};

// One for each level, defined in its file of this directory where the build's architecture has it; isa.cpp chooses.
extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512VnniKernels;
extern const KernelTable kAvx512Bf16Kernels;
extern const KernelTable kAmxKernels;
extern const KernelTable kAmxEmulatedKernels;
extern const KernelTable kAmxPlainKernels;
extern const KernelTable kNeonKernels;

}  // namespace awq
