// Sums over the rows that enter a Linear.
#include <cmath>

#include "base/layout.h"
#include "cuda/awq_cuda.h"
#include "cuda/warp.h"

namespace awq::cuda {
namespace {

constexpr int64_t kRowsAtOnce = 64;  // of a block

struct Batch {
  const void* x;  // [rows][k]
  Type type;
  int64_t rows;
  int64_t k;
  const float* weights;  // [rows], or null for 1
  const uint8_t* mask;   // [rows], 0 for rows that do not count; or null
  double* parts;         // [2][chunks][k]: sums of w x, then of sqrt(w) |x|
  int64_t chunks;
  float* kept;  // [rows][k]: sqrt(w) x, 0 in rows that do not count; or null
};

// A thread for each channel of a chunk of rows.
__global__ void __launch_bounds__(kItemThreads) sum_rows(Batch b) {
  const int64_t k = thread_item(), chunk = blockIdx.y;
  if (k >= b.k) return;
  double sum = 0.0, size = 0.0;
  const int64_t first = chunk * kRowsAtOnce, end = first + kRowsAtOnce < b.rows ? first + kRowsAtOnce : b.rows;
  for (int64_t row = first; row < end; ++row) {
    const bool counts = b.mask == nullptr || b.mask[row] != 0;
    const float x = counts ? load(b.x, b.type, row * b.k + k) : 0.0f;
    const float weight = b.weights == nullptr || !counts ? 1.0f : b.weights[row];
    const float scaled = x * sqrtf(weight);
    sum += static_cast<double>(weight) * static_cast<double>(x);
    size += static_cast<double>(fabsf(scaled));
    if (b.kept != nullptr) b.kept[row * b.k + k] = scaled;
  }
  b.parts[chunk * b.k + k] = sum;
  b.parts[(b.chunks + chunk) * b.k + k] = size;
}

struct Totals {
  const double* parts;  // [2][chunks][k]
  int64_t chunks;
  int64_t k;
  double* sum;      // [k]
  double* abs_sum;  // [k]
};

// Chunks are added in their order, so a sum does not depend on what ran when.
__global__ void __launch_bounds__(kItemThreads) add_chunks(Totals t) {
  const int64_t i = thread_item();
  if (i >= 2 * t.k) return;
  const int64_t which = i / t.k, k = i % t.k;
  double total = 0.0;
  for (int64_t chunk = 0; chunk < t.chunks; ++chunk) total += t.parts[(which * t.chunks + chunk) * t.k + k];
  (which == 0 ? t.sum : t.abs_sum)[k] += total;
}

}  // namespace
}  // namespace awq::cuda

using namespace awq::cuda;

int64_t awq_cuda_chunks(int64_t rows) { return awq::ceil_div(rows, kRowsAtOnce); }

int64_t awq_cuda_sum_rows(void* stream, const void* x, int64_t type, int64_t rows, int64_t k, const void* weights,
                          const void* mask, void* parts, void* sum, void* abs_sum, void* kept) {
  constexpr int64_t kMost = 65535 * kRowsAtOnce;  // of a grid
  for (int64_t first = 0; first < rows; first += kMost) {
    const int64_t count = rows - first < kMost ? rows - first : kMost, chunks = awq_cuda_chunks(count);
    const int64_t bytes = static_cast<Type>(type) == Type::f32 ? 4 : 2;
    const Batch batch{static_cast<const uint8_t*>(x) + first * k * bytes,
                      static_cast<Type>(type),
                      count,
                      k,
                      weights == nullptr ? nullptr : static_cast<const float*>(weights) + first,
                      mask == nullptr ? nullptr : static_cast<const uint8_t*>(mask) + first,
                      static_cast<double*>(parts),
                      chunks,
                      kept == nullptr ? nullptr : static_cast<float*>(kept) + first * k};
    const Blocks blocks{awq::ceil_div(k, kItemThreads), chunks};
    if (const int64_t error = launch(stream, blocks, kItemThreads, 0, sum_rows, batch); error != 0) return error;
    const Totals totals{static_cast<const double*>(parts), chunks, k, static_cast<double*>(sum),
                        static_cast<double*>(abs_sum)};
    if (const int64_t error = launch_items(stream, 2 * k, add_chunks, totals); error != 0) return error;
  }
  return 0;
}
