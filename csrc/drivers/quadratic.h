// e G e^T for many rows e and one symmetric G, without storing e G.
//
// G is cut into column panels J, as wide as a tile. By symmetry
//
//     e G e^T = sum over J of (2 sum over I < J of e_I G_IJ + e_J G_JJ) e_J^T,
//
// so each panel is kept only down to its diagonal block, with everything above that doubled (which is exact): half the
// work of the full product. A bilinear form is a sum over any partition of the first factor's channels, so panels are
// read in blocks of k that fit the first-level cache, and each block's product goes straight into the sum.
#pragma once

#include <cstdint>

#include "base/buffer.h"
#include "drivers/products.h"
#include "kernels/kernels.h"

namespace awq {

// The precision to rank candidates in: bf16 where the level has it. Rounding changes an entry by a relative error of at
// most 2^-8, and of u = 0.43 * 2^-8 rms (over a binary order of magnitude; 2^-8 / sqrt(3) at its lower end), with
// random sign. Let L = e G e^T and A = sum of e_i^2 G_ii, the loss that independent errors would have. Because |G_ij|
// <= sqrt(G_ii G_jj), rounding G moves L by at most sqrt(2) u A rms; because |(G e)_i| <= sqrt(G_ii L), rounding e
// moves it by at most 2 u sqrt(A L). Together that is about 0.4 % of a row's loss where L is near A. It averages out
// over the rows, and the part due to G is much the same for every candidate.
Precision ranking_precision(const KernelTable& table);

// The precision of losses over k channels that are to be as exact as in fp32. There a term e_i G_ij e_j passes 256
// sums, those of a block of k, and a few more within the tile: it may be off by 290 * 2^-24. Split, where two terms of
// each factor give four products on tile registers, both e_i and G_ij are off by at most 2^-17, together 256 * 2^-24,
// because rounding to 8 bits leaves at most 2^-8, and rounding that again 2^-17. Of the sums, a term passes 16 within a
// product of tiles, 4 for each 32 channels of a block of 192, and less than 10 more: it may be off by 306 * 2^-24 in
// all. With fewer channels than kSplitChannels fp32 has fewer sums, and stays.
Precision loss_precision(const KernelTable& table, int64_t k);
constexpr int64_t kSplitChannels = 512;

// G, k x k with row stride ld, as upper-triangular panels.
class MomentPanels {
 public:
  MomentPanels(const KernelTable& table, Precision precision, int64_t k);

  // Panels can be filled in parallel: fill(j) for every j < count().
  int64_t count() const { return padded_ / shape_.cols; }
  void fill(int64_t panel, const float* g, int64_t ld);

  int64_t channels() const { return channels_; }
  int64_t padded_channels() const { return padded_; }  // a multiple of a tile's columns
  // Floats from one row of e to the next: one tile more than needed, because at a stride of a power of two the rows of
  // a tile would compete for the same few places in the first-level cache.
  int64_t row_stride() const { return padded_ + shape_.cols; }
  Precision precision() const { return precision_; }
  const TileShape& shape() const { return shape_; }
  const KernelTable& table() const { return *table_; }

  // out[r] += the part of e_r G e_r^T in which the channels of the first factor are those of block `block`, for
  // `panels` packed row panels. rows: the same values in fp32, row_stride() apart; columns past channels() are 0. To be
  // called within a ProductTask.
  void add_block(int64_t block, const void* row_panels, const float* rows, int64_t panels, double* out) const;
  int64_t block_count() const;

 private:
  int64_t offset(int64_t panel) const;

  const KernelTable* table_;
  Precision precision_;
  TileShape shape_;
  int64_t channels_;
  int64_t padded_;
  Buffer<char> data_;
};

// Packs a square of contiguous values, as many rows as a tile has columns, as a part of a column panel. The square is
// scratch afterwards.
void pack_column_square(const KernelTable& table, Precision precision, float* square, void* out);
// out[m] += a[m] b e[m]^T for k channels of a packed row panel a and a column panel b; e: fp32 at row stride lde. To be
// called within a ProductTask.
void add_form(const KernelTable& table, Precision precision, const void* a, const void* b, int64_t k, const float* e,
              int64_t lde, double* out);
// Packs a tile's rows of k values, `stride` apart, as one row panel (k a multiple of its depth); bf16 rounds the rows
// first, in place, so that both factors of a form e G e^T are the same numbers.
void pack_row_panel(const KernelTable& table, Precision precision, float* rows, int64_t stride, int64_t k, void* panel);
// The same for rows that are multiplied with MomentPanels: row_stride() apart, columns past the end 0.
void pack_row_panel(const MomentPanels& g, float* rows, void* panel);
// Bytes of one row panel.
int64_t row_panel_bytes(const MomentPanels& g);

// losses[r] = e_r G e_r^T for r < count. make_row(r, row, thread), called from several threads, writes row r:
// row_stride() floats, 0 past channels.
template <class MakeRow>
void quadratic_losses(const MomentPanels& g, int64_t count, int threads, const MakeRow& make_row, double* losses);

}  // namespace awq

#include "drivers/quadratic-inl.h"
