// The large products of a Cholesky factorization on tile registers: see Factorization in gptq_factor.cpp.
#pragma once

#include <cstdint>

#include "base/buffer.h"
#include "drivers/products.h"

namespace awq {

// Factors are held in three terms, exactly, and six products of these leave out 2^-24 of a product: as much as fp32
// rounds off. Sums are shorter than in fp32: of a block of 128 channels a product passes 41 at most (feedback.h), and
// then one for each block. Two terms, off by 2^-16, are not enough: a pivot is what is left of a diagonal entry, as
// little as the damping, and where 2^-16 of the entry is more than that, the factorization fails or is that of another
// matrix (tests/kernels/test_feedback.py).
class WideProducts {
 public:
  // Columns that are done at a time. So a row of R is packed up to K / 256 times, and what these columns subtract from
  // each other is left for fp32 FMA: 288 / K of all products.
  static constexpr int64_t kColumns = 256;

  // h: [K][K], its upper triangle being replaced by R from the last column to the first.
  WideProducts(const Bf16Products& products, float* h, int64_t k, int threads);

  // H[0 : end, begin : end] -= R[0 : end, end : K] R[begin : end, end : K]^T with end < K, begin = end - kColumns, both
  // multiples of it.
  void subtract(int64_t begin, int64_t end);

 private:
  void pack_columns(int64_t begin, int64_t end);
  // Rows of panels first .. last, `count` of k from `from` on, as left panels.
  void pack_rows(int64_t first, int64_t last, int64_t from, int64_t count, uint16_t* out) const;

  const Bf16Products& products_;
  float* h_;
  int64_t k_;
  int threads_;
  int64_t side_;
  Buffer<uint16_t> columns_;  // -R[begin : end, end : K]^T as right panels
  Buffer<uint16_t> rows_;     // of each thread
};

}  // namespace awq
