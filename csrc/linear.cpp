#include "linear.h"

#include <algorithm>

#include "buffer.h"
#include "layout.h"
#include "parallel.h"

namespace awq {
namespace {

constexpr int64_t kBytesPerTask = 1 << 15;  // packed weights that a task reads
constexpr int64_t kMaxRows = 8;             // of int4_dot

int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

int64_t rows_per_task(const Int4Weight& w) { return std::max<int64_t>(1, kBytesPerTask / packed_bytes(w.in_features)); }

void load_steps(const KernelTable& table, const Int4Weight& w, int64_t n, int64_t groups, float* steps) {
  const char* scales = static_cast<const char*>(w.scales) + n * groups * dtype_bytes(w.scale_dtype);
  table.to_float(scales, w.scale_dtype, groups, steps);
}

// Even channels, then odd ones: the two nibbles of a vector of bytes then meet contiguous activations.
void split_parity(const float* x, int64_t in_features, float* even, float* odd) {
  for (int64_t i = 0; i < in_features / 2; ++i) {
    even[i] = x[2 * i];
    odd[i] = x[2 * i + 1];
  }
  if (in_features % 2 != 0) {
    even[in_features / 2] = x[in_features - 1];
    odd[in_features / 2] = 0.0f;
  }
}

}  // namespace

bool groups_are_whole_bytes(const Int4Weight& w) { return w.group_length % 2 == 0 || w.group_length >= w.in_features; }

void int4_linear_rows(const KernelTable& table, const Int4Weight& w, const float* x, int64_t rows, const float* bias,
                      float* y, int threads) {
  const int64_t bytes = packed_bytes(w.in_features), groups = ceil_div(w.in_features, w.group_length);
  const int64_t group_bytes = packed_bytes(w.group_length), bundle = rows_per_task(w);
  // One cache line more than needed: at a stride of a power of two the sixteen streams of eight rows would compete for
  // the same few places in the first-level cache.
  const int64_t ldx = bytes + 16;
  Buffer<float> split(rows * 2 * ldx), scratch(threads * groups);
  for (int64_t m = 0; m < rows; ++m)
    split_parity(x + m * w.in_features, w.in_features, split.get() + m * 2 * ldx, split.get() + (m * 2 + 1) * ldx);
  parallel_for(ceil_div(w.out_features, bundle), threads, [&](int64_t task, int thread) {
    float* steps = scratch.get() + thread * groups;
    for (int64_t n = task * bundle; n < std::min(w.out_features, (task + 1) * bundle); ++n) {
      load_steps(table, w, n, groups, steps);
      for (int64_t m = 0; m < rows; m += kMaxRows) {
        const int count = static_cast<int>(std::min(kMaxRows, rows - m));
        float* out = y + m * w.out_features + n;
        table.int4_dot(w.packed + n * bytes, steps, w.zeros + n * groups, bytes, group_bytes, split.get() + m * 2 * ldx,
                       ldx, count, out, w.out_features);
        if (bias != nullptr)
          for (int r = 0; r < count; ++r) out[r * w.out_features] += bias[n];
      }
    }
  });
}

void dequantize_int4(const KernelTable& table, const Int4Weight& w, int64_t first, int64_t count, Dtype dtype,
                     void* out, int threads) {
  const int64_t k = w.in_features, bytes = packed_bytes(k), groups = ceil_div(k, w.group_length);
  const int64_t bundle = rows_per_task(w);
  Buffer<float> values(threads * (k + groups));
  Buffer<uint8_t> codes(threads * k);
  parallel_for(ceil_div(count, bundle), threads, [&](int64_t task, int thread) {
    float* row = values.get() + thread * (k + groups);
    float* steps = row + k;
    uint8_t* row_codes = codes.get() + thread * k;
    for (int64_t i = task * bundle; i < std::min(count, (task + 1) * bundle); ++i) {
      const int64_t n = first + i;
      load_steps(table, w, n, groups, steps);
      table.unpack_int4(w.packed + n * bytes, k, row_codes);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * w.group_length, length = std::min(w.group_length, k - begin);
        table.dequantize_group(row_codes + begin, length, steps[g], static_cast<float>(w.zeros[n * groups + g]),
                               row + begin);
      }
      table.from_float(row, dtype, k, static_cast<char*>(out) + i * k * dtype_bytes(dtype));
    }
  });
}

}  // namespace awq
