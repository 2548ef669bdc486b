// Rounding with error feedback, and coordinate descent on codes and scales. The large products are the caller's; here
// is what goes channel by channel, or group by group.
#include <cmath>

#include "base/layout.h"
#include "cuda/awq_cuda.h"
#include "cuda/warp.h"

namespace awq::cuda {
namespace {

constexpr int kPanel = kWarp;  // channels that one launch rounds: one for each lane

struct Panel {
  const float* sums;    // [n][count]: sum over the channels i outside the panel of e_i M_ij
  const float* matrix;  // [count][pitch]: M within the panel
  int64_t pitch;
  const float* weight;   // [n][k], scaled
  const int64_t* order;  // [k]: the channel at each place; null: the place itself
  const float* steps;    // [n][groups]
  const uint8_t* zeros;  // [n][groups]
  int64_t n;
  int64_t k;
  int64_t group;
  int64_t groups;
  int64_t first;  // place of the panel's first channel
  int count;
  float top;
  float* error;    // [n][k], by place: read and written
  uint8_t* codes;  // [n][k], by channel
};

// A warp for each row. In turn the code of each place j is set to what is nearest to w_j + (sum over i != j of e_i
// M_ij) / M_jj, and its error e_j = w_j - value is told to all others. With an upper triangular M and errors that begin
// as 0 this is error feedback, with a symmetric one descent on e M e^T.
__global__ void __launch_bounds__(kItemWarps* kWarp) round_panel(Panel p) {
  float* matrix = reinterpret_cast<float*>(shared_memory());  // [kPanel][kPanel]
  for (int i = static_cast<int>(threadIdx.x); i < kPanel * kPanel; i += kItemWarps * kWarp) {
    const int row = i / kPanel, column = i % kPanel;
    matrix[i] = row < p.count && column < p.count ? p.matrix[row * p.pitch + column] : 0.0f;
  }
  sync_block();
  const int64_t row = warp_item();
  if (row >= p.n) return;
  const int lane = warp_lane();
  const bool there = lane < p.count;
  const int64_t place = p.first + lane;
  const int64_t channel = !there ? 0 : p.order == nullptr ? place : p.order[place], at = channel / p.group;
  const float weight = there ? p.weight[row * p.k + channel] : 0.0f;
  const float step = there ? p.steps[row * p.groups + at] : 1.0f;
  const float zero = there ? static_cast<float>(p.zeros[row * p.groups + at]) : 0.0f;
  const float own = there ? matrix[lane * kPanel + lane] : 1.0f;
  float error = there ? p.error[row * p.k + place] : 0.0f, code = 0.0f;
  float sum = there ? p.sums[row * p.count + lane] : 0.0f;
  for (int i = 0; i < p.count; ++i) {
    const float other = warp_from(error, i);
    if (i != lane) sum += other * matrix[i * kPanel + lane];
  }
  for (int j = 0; j < p.count; ++j) {
    const float target = weight + sum / own;
    float next = nearbyintf(target / step) + zero;
    next = next > 0.0f ? (next < p.top ? next : p.top) : 0.0f;
    const float left = weight - (next - zero) * step, change = warp_from(left - error, j);
    if (lane == j) {
      code = next;
      error = left;
    } else {
      sum += change * matrix[j * kPanel + lane];
    }
  }
  if (!there) return;
  p.error[row * p.k + place] = error;
  p.codes[row * p.k + channel] = static_cast<uint8_t>(code);
}

struct Steps {
  const float* weight;   // [n][k], scaled
  const uint8_t* codes;  // [n][k]
  const uint8_t* zeros;  // [n][groups]
  int64_t n;
  int64_t k;
  int64_t groups;
  int64_t at;      // the group
  int64_t begin;   // its first channel
  int64_t length;  // its channels
  Type scale_type;
  const float* pull;  // [n][length]: e H, in the group's channels; for `write_levels` null
  const float* size;  // [n][length]: levels of the group times H within it
  float* steps;       // [n][groups]
  float* error;       // [n][k]
  float* levels;      // [n][length]
};

__device__ float level_of(const Steps& s, int64_t row, int64_t i) {
  return static_cast<float>(s.codes[row * s.k + s.begin + i]) - static_cast<float>(s.zeros[row * s.groups + s.at]);
}

__global__ void __launch_bounds__(kItemThreads) write_levels(Steps s) {
  const int64_t i = thread_item();
  if (i < s.n * s.length) s.levels[i] = level_of(s, i / s.length, i % s.length);
}

// A warp for each row: sets the group's step to its best value, its own plus (e H a) / (a H a) with a the levels; and
// the errors that follow from it.
__global__ void __launch_bounds__(kItemWarps* kWarp) move_step(Steps s) {
  const int64_t row = warp_item();
  if (row >= s.n) return;
  const int lane = warp_lane();
  // Read before the lanes meet in the sums, because lane 0 writes it after them.
  float step = s.steps[row * s.groups + s.at];
  double along = 0.0, size = 0.0;
  for (int64_t i = lane; i < s.length; i += kWarp) {
    const double level = static_cast<double>(level_of(s, row, i));
    along += level * static_cast<double>(s.pull[row * s.length + i]);
    size += level * static_cast<double>(s.size[row * s.length + i]);
  }
  along = warp_sum(along);
  size = warp_sum(size);
  // NaN where size is 0. What a storage type cannot hold rounds to infinity.
  const float best = value_of(bits_in(static_cast<float>(step + along / size), s.scale_type), s.scale_type);
  constexpr float kLargest = 0x1.fep127f;  // of bf16
  const float sign = step < 0.0f ? -1.0f : 1.0f, old = sign * step, wanted = sign * best;
  if (wanted > 0.5f * old && wanted < 2.0f * old && wanted <= kLargest) step = best;
  for (int64_t i = lane; i < s.length; i += kWarp) {
    const int64_t place = row * s.k + s.begin + i;
    s.error[place] = s.weight[place] - level_of(s, row, i) * step;
  }
  if (lane == 0) s.steps[row * s.groups + s.at] = step;
}

}  // namespace
}  // namespace awq::cuda

using namespace awq::cuda;

int64_t awq_cuda_panel(void* stream, const void* sums, const void* matrix, int64_t pitch, const void* weight,
                       const void* order, const void* steps, const void* zeros, int64_t n, int64_t k, int64_t group,
                       int64_t first, int64_t count, int64_t bits, void* error, void* codes) {
  const Panel p{static_cast<const float*>(sums),
                static_cast<const float*>(matrix),
                pitch,
                static_cast<const float*>(weight),
                static_cast<const int64_t*>(order),
                static_cast<const float*>(steps),
                static_cast<const uint8_t*>(zeros),
                n,
                k,
                group,
                awq::ceil_div(k, group),
                first,
                static_cast<int>(count),
                static_cast<float>((1 << bits) - 1),
                static_cast<float*>(error),
                static_cast<uint8_t*>(codes)};
  return launch(stream, {awq::ceil_div(n, kItemWarps)}, kItemWarps * kWarp, kPanel * kPanel * 4, round_panel, p);
}

int64_t awq_cuda_levels(void* stream, const void* codes, const void* zeros, int64_t n, int64_t k, int64_t group,
                        int64_t at, void* levels) {
  Steps s{};
  s.codes = static_cast<const uint8_t*>(codes);
  s.zeros = static_cast<const uint8_t*>(zeros);
  s.n = n;
  s.k = k;
  s.groups = awq::ceil_div(k, group);
  s.at = at;
  s.begin = at * group;
  s.length = k - s.begin < group ? k - s.begin : group;
  s.levels = static_cast<float*>(levels);
  return launch_items(stream, n * s.length, write_levels, s);
}

int64_t awq_cuda_move_step(void* stream, const void* weight, const void* codes, const void* zeros, int64_t n, int64_t k,
                           int64_t group, int64_t at, int64_t scale_type, const void* pull, const void* size,
                           void* steps, void* error) {
  const int64_t begin = at * group;
  const Steps s{static_cast<const float*>(weight),
                static_cast<const uint8_t*>(codes),
                static_cast<const uint8_t*>(zeros),
                n,
                k,
                awq::ceil_div(k, group),
                at,
                begin,
                k - begin < group ? k - begin : group,
                static_cast<Type>(scale_type),
                static_cast<const float*>(pull),
                static_cast<const float*>(size),
                static_cast<float*>(steps),
                static_cast<float*>(error),
                nullptr};
  return launch_warps(stream, n, move_step, s);
}
