#include "drivers/learned.h"

#include <algorithm>

#include "base/buffer.h"
#include "base/layout.h"
#include "base/parallel.h"

namespace awq {
namespace {

// The weight of row n in fp32.
void row_weight(const KernelTable& table, const LearnedCodes& c, int64_t n, float* out) {
  const int64_t k = c.in_features, groups = ceil_div(k, c.group_length);
  const float top = static_cast<float>((1 << c.bits) - 1), divisor = c.divisor == nullptr ? 1.0f : c.divisor[n];
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * c.group_length, count = std::min(c.group_length, k - first);
    const LearnedGroup group{top, c.zeros[n * groups + g], c.scales[n * groups + g], divisor};
    table.learned_group(c.start + n * k + first, c.moved + n * k + first,
                        c.channel_scale == nullptr ? nullptr : c.channel_scale + first, count, &group, out + first);
  }
}

// A task has rows one after another: of arrays that come from memory, neighbours are fetched ahead.
constexpr int64_t kTaskChannels = 1 << 15;

template <class Body>
void for_rows(const LearnedCodes& codes, int threads, const Body& body) {
  const int64_t n = codes.out_features, rows = std::max<int64_t>(1, kTaskChannels / codes.in_features);
  parallel_for(ceil_div(n, rows), threads, [&](int64_t task, int thread) {
    for (int64_t row = task * rows; row < std::min(n, (task + 1) * rows); ++row) body(row, thread);
  });
}

float sign(float x) { return static_cast<float>((x > 0.0f) - (x < 0.0f)); }

}  // namespace

void learned_weight(const KernelTable& table, const LearnedCodes& codes, Dtype dtype, void* out, int threads) {
  const int64_t k = codes.in_features;
  Buffer<float> rows(threads * k);
  for_rows(codes, threads, [&](int64_t n, int thread) {
    float* const row = rows.get() + thread * k;
    row_weight(table, codes, n, row);
    table.from_float(row, dtype, k, static_cast<char*>(out) + n * k * dtype_bytes(dtype));
  });
}

void move_learned(const KernelTable& table, const LearnedCodes& codes, Dtype dtype, const void* gradient, float rate,
                  float theta_rate, float* moved, float* thetas, int threads) {
  const int64_t k = codes.in_features, groups = ceil_div(k, codes.group_length);
  Buffer<float> rows(threads * 2 * k);
  for_rows(codes, threads, [&](int64_t n, int thread) {
    float* const weight = rows.get() + thread * 2 * k;
    float* const slope = weight + k;
    row_weight(table, codes, n, weight);
    table.to_float(static_cast<const char*>(gradient) + n * k * dtype_bytes(dtype), dtype, k, slope);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * codes.group_length, count = std::min(codes.group_length, k - first);
      const float step = rate * sign(codes.scales[n * groups + g]);
      const float sum = table.move_group(slope + first, weight + first, count, step, kReach, moved + n * k + first);
      thetas[n * groups + g] -= theta_rate * sign(sum);
    }
  });
}

}  // namespace awq
