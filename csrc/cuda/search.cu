// What searches need beside rounding (quantize.cu) and products: losses, and the choice of the best range of a group.
#include "base/layout.h"
#include "cuda/awq_cuda.h"
#include "cuda/warp.h"

namespace awq::cuda {
namespace {

struct Forms {
  const float* product;   // [n][k]: error times the second moment
  const float* error;     // [n][k]
  const float* diagonal;  // [k], or null
  int64_t n;
  int64_t k;
  double* loss;  // [n]: sum of product * error
  double* own;   // [n]: sum of error^2 * diagonal; not written without one
};

// A warp for each row.
__global__ void __launch_bounds__(kItemWarps* kWarp) row_forms(Forms f) {
  const int64_t row = warp_item();
  if (row >= f.n) return;
  double loss = 0.0, own = 0.0;
  for (int64_t i = warp_lane(); i < f.k; i += kWarp) {
    const double error = static_cast<double>(f.error[row * f.k + i]);
    loss += static_cast<double>(f.product[row * f.k + i]) * error;
    if (f.diagonal != nullptr) own += error * error * static_cast<double>(f.diagonal[i]);
  }
  loss = warp_sum(loss);
  own = warp_sum(own);
  if (warp_lane() > 0) return;
  f.loss[row] = loss;
  if (f.diagonal != nullptr) f.own[row] = own;
}

struct Ranges {
  const float* product;  // [groups][n][group]
  const float* error;    // [groups][n][group]
  int64_t n;
  int64_t group;
  int64_t groups;
  const float* ratio;  // one: the range that made these errors
  double* best;        // [n][groups]
  float* chosen;       // [n][groups]
};

// A warp for each group of a row: takes the ratio if it loses less than the best so far.
__global__ void __launch_bounds__(kItemWarps* kWarp) better_range(Ranges r) {
  const int64_t item = warp_item();
  if (item >= r.n * r.groups) return;
  const int64_t row = item % r.n, group = item / r.n, at = row * r.groups + group;
  double loss = 0.0;
  for (int64_t i = warp_lane(); i < r.group; i += kWarp)
    loss += static_cast<double>(r.product[item * r.group + i]) * static_cast<double>(r.error[item * r.group + i]);
  loss = warp_sum(loss);
  if (warp_lane() > 0 || !(loss < r.best[at])) return;
  r.best[at] = loss;
  r.chosen[at] = *r.ratio;
}

}  // namespace
}  // namespace awq::cuda

using namespace awq::cuda;

int64_t awq_cuda_forms(void* stream, const void* product, const void* error, const void* diagonal, int64_t n, int64_t k,
                       void* loss, void* own) {
  const Forms f{
      static_cast<const float*>(product), static_cast<const float*>(error), static_cast<const float*>(diagonal), n, k,
      static_cast<double*>(loss),         static_cast<double*>(own)};
  return launch_warps(stream, n, row_forms, f);
}

int64_t awq_cuda_better_range(void* stream, const void* product, const void* error, int64_t n, int64_t group,
                              int64_t groups, const void* ratio, void* best, void* chosen) {
  const Ranges r{static_cast<const float*>(product),
                 static_cast<const float*>(error),
                 n,
                 group,
                 groups,
                 static_cast<const float*>(ratio),
                 static_cast<double*>(best),
                 static_cast<float*>(chosen)};
  return launch_warps(stream, n * groups, better_range, r);
}
