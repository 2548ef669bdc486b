// e G e^T for many rows e and one symmetric G, without storing e G.
//
// G is cut into column panels J of tile_cols columns. By symmetry
//
//     e G e^T = sum over J of (2 sum over I < J of e_I G_IJ + e_J G_JJ) e_J^T,
//
// so each panel is kept only down to its diagonal block, with everything above that doubled (which is exact): half the
// work of the full product. A bilinear form is a sum over any partition of the first factor's channels, so panels are
// read in blocks of k that fit the first-level cache, and each block's product goes straight into the sum.
#pragma once

#include <cstdint>

#include "base/buffer.h"
#include "kernels/kernels.h"

namespace awq {

// How the factors are held. bf16 needs a level with the kernels for it.
enum class Precision { f32, bf16 };

constexpr int64_t value_bytes(Precision precision) { return precision == Precision::bf16 ? 2 : 4; }

// The precision to rank candidates in: bf16 where the level has it. Rounding changes an entry by a relative error of at
// most u = 2^-9, rms at most u / sqrt(3), with random sign. Let L = e G e^T and A = sum of e_i^2 G_ii, the loss that
// independent errors would have. Because |G_ij| <= sqrt(G_ii G_jj), rounding G moves L by at most sqrt(2/3) u A rms;
// because |(G e)_i| <= sqrt(G_ii L), rounding e moves it by at most 2/sqrt(3) u sqrt(A L). Together that is about 0.3 %
// of a row's loss where L is near A. It averages out over the rows, and the part due to G is much the same for every
// candidate. Losses in reports are computed in fp32.
Precision ranking_precision(const KernelTable& table);

// G, k x k with row stride ld, as upper-triangular panels.
class MomentPanels {
 public:
  MomentPanels(const KernelTable& table, Precision precision, int64_t k);

  // Panels can be filled in parallel: fill(j) for every j < count().
  int64_t count() const { return padded_ / table_->tile_cols; }
  void fill(int64_t panel, const float* g, int64_t ld);

  int64_t channels() const { return channels_; }
  int64_t padded_channels() const { return padded_; }  // a multiple of tile_cols
  // Floats from one row of e to the next: one tile more than needed, because at a stride of a power of two the rows of
  // a tile would compete for the same few places in the first-level cache.
  int64_t row_stride() const { return padded_ + table_->tile_cols; }
  Precision precision() const { return precision_; }
  const KernelTable& table() const { return *table_; }

  // out[r] += the part of e_r G e_r^T in which the channels of the first factor are those of block `block`, for
  // `panels` packed row panels. rows: the same values in fp32, row_stride() apart; columns past channels() are 0.
  void add_block(int64_t block, const void* row_panels, const float* rows, int64_t panels, double* out) const;
  int64_t block_count() const;

 private:
  int64_t offset(int64_t panel) const;

  const KernelTable* table_;
  Precision precision_;
  int64_t channels_;
  int64_t padded_;
  Buffer<char> data_;
};

// Packs tile_cols contiguous rows of tile_cols values as a part of a column panel.
void pack_column_square(const KernelTable& table, Precision precision, const float* square, void* out);
// out[m] += a[m] b e[m]^T for k channels of a packed row panel a and a column panel b; e: fp32 at row stride lde.
void add_form(const KernelTable& table, Precision precision, const void* a, const void* b, int64_t k, const float* e,
              int64_t lde, double* out);
// Packs tile_rows rows of k values, `stride` apart, as one row panel (bf16: k even); bf16 rounds the rows first, in
// place, so that both factors of a form e G e^T are the same numbers.
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
