// The NEON kernels against the scalar ones, and both against sums in double: a program without torch or Python, so that
// it can be cross-compiled and run under an emulator (test_neon.py). Integers and 16-bit patterns must be equal, floats
// within the bounds of tests/kernels/test_kernels.py and tests/layers/test_ops.py: a sum of n products in fp32 is off
// by at most n + 4 units of 2^-24 of the sum of magnitudes. Prints the number of checks; ends with 1 at the first that
// fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/layout.h"
#include "drivers/linear.h"
#include "drivers/tiles.h"
#include "kernels/kernels.h"

using namespace awq;

namespace {

const KernelTable& scalar = kScalarKernels;
const KernelTable& neon = kNeonKernels;
std::mt19937 generator(1);
long checks = 0;

void check(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  std::printf("failed: %s\n", what.c_str());
  std::exit(1);
}

std::vector<float> normal(int64_t n) {
  std::normal_distribution<float> distribution;
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = distribution(generator);
  return v;
}

std::vector<uint8_t> bytes(int64_t n, unsigned below) {
  std::vector<uint8_t> v(static_cast<size_t>(n));
  for (uint8_t& x : v) x = static_cast<uint8_t>(generator() % below);
  return v;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void test_conversions() {
  std::vector<uint16_t> halves(65536);
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<uint16_t>(i);
  std::vector<float> a(halves.size()), b(halves.size()), any(4096);
  for (float& x : any) {
    const uint32_t bits = generator();
    std::memcpy(&x, &bits, 4);
  }
  for (Dtype dtype : {Dtype::f16, Dtype::bf16}) {
    scalar.to_float(halves.data(), dtype, 65536, a.data());
    neon.to_float(halves.data(), dtype, 65536, b.data());
    check(same(a, b), "to_float");
    std::vector<uint16_t> p(any.size()), q(any.size());
    scalar.from_float(any.data(), dtype, 4096, p.data());
    neon.from_float(any.data(), dtype, 4096, q.data());
    check(same(p, q), "from_float");
  }
  b = a = any;
  scalar.round_to_bf16(a.data(), 4096);
  neon.round_to_bf16(b.data(), 4096);
  check(same(a, b), "round_to_bf16");
}

void test_quantizer(int64_t n) {
  const std::vector<float> w = normal(n), other = normal(n);
  const Range p = scalar.group_range(w.data(), n), q = neon.group_range(w.data(), n);
  check(p.lo == q.lo && p.hi == q.hi && p.first == q.first && p.constant == q.constant, "group_range");
  const Grid grid{(p.hi - p.lo) / 15 + 1e-3f, 7, 15, 0};
  std::vector<uint8_t> a(w.size()), b(w.size()), packed(w.size()), other_packed(w.size());
  scalar.quantize_group(w.data(), n, &grid, a.data());
  neon.quantize_group(w.data(), n, &grid, b.data());
  check(same(a, b), "quantize_group");
  std::vector<float> x(w.size()), y(w.size());
  scalar.dequantize_group(a.data(), n, grid.step, grid.zero, x.data());
  neon.dequantize_group(a.data(), n, grid.step, grid.zero, y.data());
  check(same(x, y), "dequantize_group");
  scalar.group_error(w.data(), other.data(), other.data(), n, &grid, x.data());
  neon.group_error(w.data(), other.data(), other.data(), n, &grid, y.data());
  check(same(x, y), "group_error");
  scalar.pack_int4(a.data(), n, packed.data());
  neon.pack_int4(a.data(), n, other_packed.data());
  check(same(packed, other_packed), "pack_int4");
  neon.unpack_int4(packed.data(), n, b.data());
  check(same(a, b), "unpack_int4");
}

void test_int8_rounding(int64_t n) {
  std::vector<float> x = normal(n);
  for (int kind = 0; kind < 4; ++kind) {
    if (kind == 1) x[static_cast<size_t>(n) / 2] = 127.0f;  // exact halves
    if (kind == 2) x.assign(x.size(), 0.0f);
    if (kind == 3) x.back() = NAN;
    std::vector<uint32_t> a(static_cast<size_t>(ceil_div(n, 4))), b(a.size());
    const Int8Run p = scalar.quantize_int8(x.data(), n, a.data()), q = neon.quantize_int8(x.data(), n, b.data());
    check(same(a, b) && p.sum == q.sum && std::memcmp(&p.scale, &q.scale, 4) == 0, "quantize_int8");
  }
}

void test_sums(int64_t n) {
  const std::vector<float> x = normal(kSumRows * n), weights = normal(kSumRows), roots = normal(kSumRows);
  std::vector<double> a(static_cast<size_t>(n), 1.0), b = a, c = a, d = a;
  scalar.add_sums(x.data(), n, a.data(), c.data());
  neon.add_sums(x.data(), n, b.data(), d.data());
  check(same(a, b) && same(c, d), "add_sums");
  scalar.add_weighted_sums(x.data(), weights.data(), roots.data(), n, a.data(), c.data());
  neon.add_weighted_sums(x.data(), weights.data(), roots.data(), n, b.data(), d.data());
  check(same(a, b) && same(c, d), "add_weighted_sums");
}

// Sums over k of a[k][m] * b[k][n], in double, and of their magnitudes.
void test_gemm(const KernelTable& table, int64_t k) {
  const int64_t rows = table.tile_rows, cols = table.tile_cols;
  const std::vector<float> a = normal(k * rows), b = normal(k * cols), e = normal(rows * cols);
  std::vector<float> c(e.size());
  std::vector<double> form(static_cast<size_t>(rows));
  table.gemm_tile(a.data(), b.data(), k, c.data(), cols);
  table.quadratic_tile(a.data(), b.data(), k, e.data(), cols, form.data());
  for (int64_t m = 0; m < rows; ++m) {
    double exact_form = 0, size_form = 0;
    for (int64_t n = 0; n < cols; ++n) {
      double exact = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double term = static_cast<double>(a[i * rows + m]) * b[i * cols + n];
        exact += term;
        size += std::abs(term);
      }
      check(std::abs(c[m * cols + n] - exact) <= size * static_cast<double>(k + 4) * 0x1p-24, "gemm_tile");
      exact_form += exact * e[m * cols + n];
      size_form += size * std::abs(e[m * cols + n]);
    }
    check(std::abs(form[m] - exact_form) <= size_form * static_cast<double>(k + cols + 4) * 0x1p-24, "quadratic_tile");
  }
}

struct Layer {
  int64_t n, k, length;
  int bits;
  std::vector<uint8_t> tiles, zeros;
  std::vector<uint16_t> scales;
  std::vector<float> weight;  // [n][k], exact

  Layer(int64_t n, int64_t k, int64_t length, int bits) : n(n), k(k), length(length), bits(bits) {
    const int64_t groups = ceil_div(k, length), count = tile_count(n);
    std::vector<uint8_t> rows = bytes(n * row_bytes(k, bits), 256);
    if (bits == 4 && k % 2 != 0)
      for (int64_t j = 1; j <= n; ++j) rows[static_cast<size_t>(j * packed_bytes(k) - 1)] &= 15;
    tiles.resize(static_cast<size_t>(count * step_count(k, length) * step_bytes(bits)));
    tile_codes(rows.data(), n, k, length, bits, tiles.data(), 1);
    std::vector<uint8_t> back(rows.size());
    untile_codes(tiles.data(), n, k, length, bits, back.data(), 1);
    check(same(rows, back), "untile_codes");
    zeros = bytes(count * groups * tile_zero_bytes(bits), 256);
    scales.resize(static_cast<size_t>(count * groups * kTileOutputs));
    for (uint16_t& s : scales) s = static_cast<uint16_t>(0x2000 + generator() % 0x1000);  // fp16, 2^-7 to 2^-3
    weight.resize(static_cast<size_t>(n * k));
    std::vector<float> other(weight.size());
    quant_weight(scalar, view(), weight.data(), 1);
    quant_weight(neon, view(), other.data(), 1);
    check(same(weight, other), "quant_weight");
  }
  TiledWeight view() const { return {tiles.data(), scales.data(), zeros.data(), Dtype::f16, n, k, length, bits}; }
};

// Half an epsilon of the type that results are rounded to.
double unit(Dtype dtype) { return dtype == Dtype::f32 ? 0 : dtype == Dtype::f16 ? 0x1p-11 : 0x1p-8; }

void test_linear(const Layer& layer, int64_t rows, Dtype dtype) {
  const std::vector<float> wide = normal(rows * layer.k), bias = normal(layer.n);
  std::vector<float> x(wide.size()), y(static_cast<size_t>(rows * layer.n));
  std::vector<uint8_t> narrow(wide.size() * 4), out(y.size() * 4);
  scalar.from_float(wide.data(), dtype, rows * layer.k, narrow.data());
  scalar.to_float(narrow.data(), dtype, rows * layer.k, x.data());
  for (const KernelTable* table : {&scalar, &neon}) {
    quant_linear(*table, layer.view(), narrow.data(), dtype, rows, nullptr, bias.data(), Compute::automatic, out.data(),
                 2);
    table->to_float(out.data(), dtype, rows * layer.n, y.data());
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t n = 0; n < layer.n; ++n) {
        double exact = bias[n], size = std::abs(exact);
        for (int64_t i = 0; i < layer.k; ++i) {
          const double term = static_cast<double>(x[m * layer.k + i]) * layer.weight[n * layer.k + i];
          exact += term;
          size += std::abs(term);
        }
        const double bound = size * static_cast<double>(layer.k + 5) * 0x1p-24 + std::abs(exact) * unit(dtype) * 1.01;
        check(std::abs(y[m * layer.n + n] - exact) <= bound + 1e-6 * unit(dtype), "quant_linear");
      }
  }
}

// x as its eight-bit integers times their scales, in double.
std::vector<double> rounded(const Layer& layer, const float* x) {
  constexpr int64_t kRun = 4 * kRunSteps, kOrder[] = {0, 2, 1, 3};
  std::vector<double> values;
  for (int64_t group = 0; group < layer.k; group += layer.length) {
    const int64_t end = std::min(group + layer.length, layer.k);
    for (int64_t begin = group; begin < end; begin += kRun) {
      const int64_t length = std::min(kRun, end - begin);
      std::vector<uint32_t> steps(kRunSteps);
      const Int8Run run = scalar.quantize_int8(x + begin, length, steps.data());
      for (int64_t i = 0; i < length; ++i) {
        const auto q = static_cast<int8_t>(steps[static_cast<size_t>(i / 4)] >> (8 * kOrder[i % 4]));
        values.push_back(static_cast<double>(q) * run.scale);
      }
    }
  }
  return values;
}

// The sums of a run are exact; two products, one sum a run are rounded.
void test_int8(const Layer& layer, int64_t rows) {
  const std::vector<float> x = normal(rows * layer.k);
  std::vector<float> y(static_cast<size_t>(rows * layer.n));
  const double runs = static_cast<double>(run_count(step_count(layer.k, layer.length), layer.length, kRunSteps));
  for (const KernelTable* table : {&scalar, &neon}) {
    quant_linear(*table, layer.view(), x.data(), Dtype::f32, rows, nullptr, nullptr, Compute::int8, y.data(), 2);
    for (int64_t m = 0; m < rows; ++m) {
      const std::vector<double> values = rounded(layer, x.data() + m * layer.k);
      for (int64_t n = 0; n < layer.n; ++n) {
        double exact = 0, size = 0;
        for (int64_t i = 0; i < layer.k; ++i) {
          const double term = values[static_cast<size_t>(i)] * layer.weight[n * layer.k + i];
          exact += term;
          size += std::abs(term);
        }
        check(std::abs(y[m * layer.n + n] - exact) <= size * (runs + 3) * 0x1p-24, "quant_linear of int8");
      }
    }
  }
}

}  // namespace

int main() {
  test_conversions();
  for (int64_t n : {1, 3, 4, 7, 16, 33, 128, 255, 256}) {
    test_quantizer(n);
    test_int8_rounding(n);
    test_sums(n);
  }
  for (int64_t k : {1, 2, 17, 128}) {
    test_gemm(scalar, k);
    test_gemm(neon, k);
  }
  const int64_t shapes[][3] = {{5, 13, 13}, {7, 13, 7}, {33, 96, 32}, {40, 300, 128}, {64, 70, 16}, {33, 1100, 1100}};
  for (const auto& shape : shapes)
    for (int bits : {4, 8}) {
      const Layer layer(shape[0], shape[1], shape[2], bits);
      for (int64_t rows : {1, 2, 3, 4, 5, 8, 9, 17, 40}) {
        for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) test_linear(layer, rows, dtype);
        test_int8(layer, rows);
      }
    }
  std::printf("%ld checks\n", checks);
  return 0;
}
