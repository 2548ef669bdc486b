// The Linear with weights of 4 or 8 bits, and the weight itself.
#include "cuda/awq_cuda.h"
#include "cuda/linear_few.h"
#include "cuda/linear_gemm.h"
#include "cuda/linear_parts.h"
#include "cuda/linear_small.h"
#include "cuda/linear_wgmma.h"
#include "cuda/tiles.h"

namespace awq::cuda {
namespace {

struct Arranged {
  const uint16_t* x;
  const float* scale;  // null for 1
  uint16_t* out;
  int64_t rows;
  int64_t k;
  int64_t group;
  int64_t group_steps;
  int64_t pitch;
  Type type;
};

__global__ void __launch_bounds__(256) arrange(Arranged a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.rows * a.pitch) return;
  const int64_t row = i / a.pitch, place = i % a.pitch, group = place / 4 / a.group_steps;
  const int64_t inside = place - group * a.group_steps * 4, channel = group * a.group + inside;
  uint16_t bits = 0;
  if (inside < a.group && channel < a.k) {
    bits = a.x[row * a.k + channel];
    if (a.scale != nullptr) bits = bits_in(value_of(bits, a.type) * a.scale[channel], a.type);
  }
  a.out[i] = bits;
}

struct FloatRows {
  const float* x;  // [rows][k]
  int64_t rows;
  const void* bias;
  Type bias_type;
  float* y;
};

constexpr int kFloatRows = 8, kFloatWarps = 8;

// Lane l computes output l of a tile for eight rows, the warps of a block parts of the steps.
template <int kBits>
__global__ void __launch_bounds__(kFloatWarps* kWarp) linear_f32(Weight w, FloatRows rows) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t tile = blockIdx.x, first_row = static_cast<int64_t>(blockIdx.y) * kFloatRows;
  const int count = static_cast<int>(rows.rows - first_row < kFloatRows ? rows.rows - first_row : kFloatRows);
  const int begin = static_cast<int>(static_cast<int64_t>(w.steps) * warp / kFloatWarps);
  const int end = static_cast<int>(static_cast<int64_t>(w.steps) * (warp + 1) / kFloatWarps);
  float total[kFloatRows] = {};
  for (int step = begin; step < end;) {
    const int group = step / w.group_steps,
              last = (group + 1) * w.group_steps < end ? (group + 1) * w.group_steps : end;
    const int64_t at = tile * w.groups + group;
    const uint8_t z = w.zeros[at * 4 * kBits + (kBits == 4 ? lane % 16 : lane)];
    const float zero = static_cast<float>(kBits == 4 ? z >> (lane / 16 * 4) & 15 : z);
    const int64_t stop = static_cast<int64_t>(group + 1) * w.group < w.k ? int64_t{group + 1} * w.group : w.k;
    float part[kFloatRows] = {};
    for (; step < last; ++step) {
      const uint8_t* codes = w.codes + (tile * w.steps + step) * (16 * kBits);
      const uint32_t word = reinterpret_cast<const uint32_t*>(codes)[kBits == 4 ? lane % 16 : lane];
      const int64_t channel = static_cast<int64_t>(group) * w.group + 4 * (step - group * w.group_steps);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (channel + c >= stop) break;
        const int shift = 8 * (c == 1 ? 2 : c == 2 ? 1 : c);  // bytes are channels 0, 2, 1, 3
        const uint32_t code = kBits == 4 ? word >> (shift + lane / 16 * 4) & 15 : word >> shift & 255;
        const float level = static_cast<float>(code) - zero;
#pragma unroll
        for (int r = 0; r < kFloatRows; ++r)
          if (r < count) part[r] = fma_rn(rows.x[(first_row + r) * w.k + channel + c], level, part[r]);
      }
    }
    const float scale = value_of(w.scales[at * 32 + lane], w.scale_type);
#pragma unroll
    for (int r = 0; r < kFloatRows; ++r) total[r] = fma_rn(scale, part[r], total[r]);
  }
  float* sums = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int r = 0; r < kFloatRows; ++r) sums[(warp * kFloatRows + r) * kWarp + lane] = total[r];
  sync_block();
  const int64_t output = tile * 32 + lane;
  if (warp >= count || output >= w.n) return;
  float sum = 0.0f;
  for (int v = 0; v < kFloatWarps; ++v) sum += sums[(v * kFloatRows + warp) * kWarp + lane];
  if (rows.bias != nullptr) sum += load(rows.bias, rows.bias_type, output);
  rows.y[(first_row + warp) * w.n + output] = sum;
}

static_assert(kFloatWarps == kFloatRows, "each warp writes a row");

constexpr int kWeightSteps = 32;

// A block writes 32 steps of a tile: neighbouring threads write neighbouring channels of one output.
template <int kBits>
__global__ void __launch_bounds__(512) weight_rows(Weight w, Type type, void* out) {
  const int64_t tile = blockIdx.x;
  const int step = static_cast<int>(blockIdx.y) * kWeightSteps + static_cast<int>(threadIdx.x) % kWeightSteps;
  if (step >= w.steps) return;
  const int group = step / w.group_steps;
  const int64_t channel = static_cast<int64_t>(group) * w.group + 4 * (step - group * w.group_steps);
  const int64_t end = static_cast<int64_t>(group + 1) * w.group, stop = end < w.k ? end : w.k;
  const int64_t at = tile * w.groups + group;
  for (int j = static_cast<int>(threadIdx.x) / kWeightSteps; j < 32; j += 16) {
    const int64_t output = tile * 32 + j;
    if (output >= w.n) return;
    const int nibble = kBits == 4 ? j / 16 * 4 : 0, index = kBits == 4 ? j % 16 : j;
    constexpr uint32_t kMask = kBits == 4 ? 15 : 255;
    const uint32_t word = reinterpret_cast<const uint32_t*>(w.codes + (tile * w.steps + step) * (16 * kBits))[index];
    const float zero = static_cast<float>(w.zeros[at * 4 * kBits + index] >> nibble & kMask);
    const float scale = value_of(w.scales[at * 32 + j], w.scale_type);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int shift = 8 * (c == 1 ? 2 : c == 2 ? 1 : c) + nibble;
      if (channel + c < stop)
        store(out, type, output * w.k + channel + c, (static_cast<float>(word >> shift & kMask) - zero) * scale);
    }
  }
}

bool gemm_takes(const Weight& w, int64_t rows) {
  return rows > kSmallRows && (w.groups == 1 || w.group_steps % 4 == 0);
}

int64_t gemm_parts(const Weight& w, int64_t rows) {
  return parts_of(ceil_div(w.tiles, kGemmTiles) * ceil_div(rows, kGemmRows), ceil_div(w.steps, kGemmSteps));
}

template <int kBits, bool kHalf>
int64_t launch_gemm(void* stream, const Weight& w, const LinearRows& rows, float* parts) {
  const int64_t rounds = ceil_div(w.steps, kGemmSteps);
  const int64_t length = parts == nullptr ? rounds : ceil_div(rounds, gemm_parts(w, rows.rows));
  const Blocks blocks{ceil_div(w.tiles, kGemmTiles), ceil_div(rows.rows, kGemmRows), ceil_div(rounds, length)};
  const int64_t error = launch(stream, blocks, kGemmThreads, kStages * int64_t{sizeof(GemmStage<kBits>)},
                               linear_gemm<kBits, kHalf>, w, rows, length, parts);
  if (parts == nullptr || error != 0) return error;
  return launch_add_parts(stream, w.n, rows, parts, blocks.z, kHalf ? Type::f16 : Type::bf16);
}

template <int kBits, bool kHalf>
int64_t launch_linear(void* stream, const Weight& w, const LinearRows& rows, float* parts) {
  if (wgmma_wanted(rows.rows) && wgmma_takes(w)) return launch_wgmma(stream, w, rows, kBits, kHalf, parts);
  if (gemm_takes(w, rows.rows)) return launch_gemm<kBits, kHalf>(stream, w, rows, parts);
  if (few_takes(w, rows.rows)) return launch_few<kBits, kHalf>(stream, w, rows);
  const int64_t eights = rows.rows <= 8 ? 1 : rows.rows <= 16 ? 2 : 4;
  // A warp should have a few chunks to read; up to 32 KiB of sums are what every GPU has without asking for more.
  const int64_t wanted = ceil_div(w.steps, 4 * kAhead), most = most_warps(static_cast<int>(eights));
  const int64_t warps = wanted < most ? wanted : most;
  const int64_t shared = warps * 1024 * eights;
  const Blocks blocks{w.tiles, ceil_div(rows.rows, 8 * eights)};
  const auto kernel = eights == 1   ? linear_small<kBits, kHalf, 1>
                      : eights == 2 ? linear_small<kBits, kHalf, 2>
                                    : linear_small<kBits, kHalf, 4>;
  return launch(stream, blocks, static_cast<int>(warps * kWarp), shared, kernel, w, rows);
}

}  // namespace
}  // namespace awq::cuda

using namespace awq::cuda;

int64_t awq_cuda_arrange(void* stream, const void* x, int64_t type, const void* scale, int64_t rows, int64_t k,
                         int64_t group, int64_t pitch, void* out) {
  const Arranged a{static_cast<const uint16_t*>(x),
                   static_cast<const float*>(scale),
                   static_cast<uint16_t*>(out),
                   rows,
                   k,
                   group,
                   awq::ceil_div(group, 4),
                   pitch,
                   static_cast<Type>(type)};
  return launch(stream, {awq::ceil_div(rows * pitch, 256)}, 256, 0, arrange, a);
}

int64_t awq_cuda_wgmma(int64_t rows) { return wgmma_wanted(rows); }

int64_t awq_cuda_few(int64_t rows, int64_t n, int64_t k, int64_t group) {
  return few_takes(make_weight(nullptr, nullptr, 0, nullptr, n, k, group), rows);
}

int64_t awq_cuda_linear_parts(int64_t rows, int64_t n, int64_t k, int64_t group) {
  const Weight w = make_weight(nullptr, nullptr, 0, nullptr, n, k, group);
  if (wgmma_wanted(rows) && wgmma_takes(w)) return wgmma_parts(w, rows);
  return gemm_takes(w, rows) ? gemm_parts(w, rows) : 1;
}

int64_t awq_cuda_linear(void* stream, const void* x, int64_t type, int64_t rows, int64_t pitch, const void* codes,
                        const void* scales, int64_t scale_type, const void* zeros, const void* bias, int64_t bias_type,
                        int64_t n, int64_t k, int64_t group, int64_t bits, void* parts, void* y) {
  const Weight w = make_weight(codes, scales, scale_type, zeros, n, k, group);
  const bool half = static_cast<Type>(type) == Type::f16;
  // A grid has at most 65535 blocks in y, of 32 rows at least.
  constexpr int64_t kMost = 65535 * kSmallRows;
  for (int64_t first = 0; first < rows; first += kMost) {
    const int64_t count = rows - first < kMost ? rows - first : kMost;
    const LinearRows part{static_cast<const uint16_t*>(x) + first * pitch,
                          pitch,
                          count,
                          bias,
                          static_cast<Type>(bias_type),
                          static_cast<uint16_t*>(y) + first * n};
    const auto run = bits == 4 ? (half ? launch_linear<4, true> : launch_linear<4, false>)
                               : (half ? launch_linear<8, true> : launch_linear<8, false>);
    if (const int64_t error = run(stream, w, part, static_cast<float*>(parts)); error != 0) return error;
  }
  return 0;
}

int64_t awq_cuda_linear_f32(void* stream, const void* x, int64_t rows, const void* codes, const void* scales,
                            int64_t scale_type, const void* zeros, const void* bias, int64_t bias_type, int64_t n,
                            int64_t k, int64_t group, int64_t bits, void* y) {
  const Weight w = make_weight(codes, scales, scale_type, zeros, n, k, group);
  constexpr int64_t kMost = 65535 * kFloatRows;
  for (int64_t first = 0; first < rows; first += kMost) {
    const int64_t count = rows - first < kMost ? rows - first : kMost;
    const FloatRows part{static_cast<const float*>(x) + first * k, count, bias, static_cast<Type>(bias_type),
                         static_cast<float*>(y) + first * n};
    const Blocks blocks{w.tiles, awq::ceil_div(count, kFloatRows)};
    const int64_t error = launch(stream, blocks, kFloatWarps * kWarp, kFloatWarps * kFloatRows * kWarp * 4,
                                 bits == 4 ? linear_f32<4> : linear_f32<8>, w, part);
    if (error != 0) return error;
  }
  return 0;
}

int64_t awq_cuda_weight(void* stream, const void* codes, const void* scales, int64_t scale_type, const void* zeros,
                        int64_t n, int64_t k, int64_t group, int64_t bits, int64_t type, void* out) {
  const Weight w = make_weight(codes, scales, scale_type, zeros, n, k, group);
  return launch(stream, {w.tiles, awq::ceil_div(w.steps, kWeightSteps)}, 512, 0,
                bits == 4 ? weight_rows<4> : weight_rows<8>, w, static_cast<Type>(type), out);
}
