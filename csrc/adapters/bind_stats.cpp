// ActivationStats: the accumulator that calibration hooks feed.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <mutex>

#include "adapters/adapters.h"
#include "adapters/bindings.h"
#include "adapters/checks.h"
#include "drivers/stats.h"
#include "kernels/isa.h"

namespace awq {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kInit = "ActivationStats";
constexpr const char* kUpdate = "ActivationStats.update";

int64_t check_in_features(int64_t in_features) {
  AWQ_CHECK(in_features > 0, kInit, "in_features", "a positive number", in_features);
  return in_features;
}

Tensor one_a_row(const char* argument, const Tensor& values, at::ScalarType dtype, int64_t rows) {
  check_dtype(kUpdate, argument, values, dtype);
  AWQ_CHECK(values.numel() == rows, kUpdate, argument, std::to_string(rows) + " elements, one a row", values.numel());
  return values.detach().cpu().reshape({-1});
}

// Weights are added one by one, so that the result does not depend on the number of threads.
double total_weight(const Tensor& weights) {
  double total = 0.0;
  for (int64_t r = 0; r < weights.numel(); ++r) {
    const float w = weights.const_data_ptr<float>()[r];
    AWQ_CHECK(std::isfinite(w) && w >= 0.0f, kUpdate, "weights", "finite numbers from 0", w);
    total += w;
  }
  return total;
}

// Methods that take long run without the GIL; a mutex keeps two threads from adding to the same sums.
class ActivationStats {
 public:
  explicit ActivationStats(int64_t in_features)
      : in_features_(check_in_features(in_features)),
        sum_(at::zeros({in_features}, at::kDouble)),
        abs_sum_(at::zeros({in_features}, at::kDouble)),
        second_moment_(at::zeros({in_features, in_features}, at::kFloat)) {}

  void update(const Tensor& x, const OptionalTensor& mask, const OptionalTensor& weights) {
    const Dtype dtype = float_dtype(kUpdate, "x", x.scalar_type());
    Tensor rows = flatten(x.detach()),
           w = weights.has_value() ? one_a_row("weights", *weights, at::kFloat, rows.size(0)).contiguous() : Tensor();
    if (mask.has_value()) {
      const Tensor kept = one_a_row("mask", *mask, at::kBool, rows.size(0)).nonzero().squeeze(1);
      rows = rows.index_select(0, kept);
      if (w.defined()) w = w.index_select(0, kept);
    }
    rows = rows.contiguous();
    const double total = w.defined() ? total_weight(w) : static_cast<double>(rows.size(0));
    const Tensor roots = w.defined() ? w.sqrt() : w;
    const std::lock_guard<std::mutex> lock(mutex_);
    const CalibrationRows view{rows.const_data_ptr(), dtype,         rows.size(0),
                               in_features_,          float_data(w), float_data(roots)};
    set_applied(1.0);
    add_sums(kernels(), view, sum_.mutable_data_ptr<double>(), abs_sum_.mutable_data_ptr<double>(),
             at::get_num_threads());
    add_second_moment(kernels(), view, second_moment_.mutable_data_ptr<float>(), at::get_num_threads());
    rows_ += rows.size(0);
    total_ += total;
    weighted_ = weighted_ || w.defined();
    mirrored_ = mirrored_ && rows.size(0) == 0;
  }

  Tensor sum() const { return weighted_ ? sum_.mul(share()) : sum_; }
  Tensor abs_sum() const { return weighted_ ? abs_sum_.mul(std::sqrt(share())) : abs_sum_; }

  // Only one triangle is accumulated; the other is filled in when the moment is read.
  Tensor second_moment() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!mirrored_) mirror_upper(second_moment_.mutable_data_ptr<float>(), in_features_, at::get_num_threads());
    mirrored_ = true;
    set_applied(share());
    return second_moment_;
  }

  int64_t rows() const { return rows_; }
  int64_t in_features() const { return in_features_; }

 private:
  // [rows, K].
  Tensor flatten(const Tensor& x) const {
    AWQ_CHECK(x.device().is_cpu(), kUpdate, "x", "a tensor on the CPU", x.device().str());
    AWQ_CHECK(x.dim() >= 1 && x.size(-1) == in_features_, kUpdate, "x",
              "a last dimension of " + std::to_string(in_features_), x.sizes());
    return x.reshape({-1, in_features_});
  }

  // What the sums are multiplied by, so that weights are 1 on average.
  double share() const { return weighted_ && total_ > 0.0 ? static_cast<double>(rows_) / total_ : 1.0; }

  // The second moment is large, so it is multiplied in place when it is read, and divided again before more rows are
  // added.
  void set_applied(double share) const {
    if (share == applied_) return;
    scale_moment(second_moment_.mutable_data_ptr<float>(), in_features_, static_cast<float>(share / applied_),
                 at::get_num_threads());
    applied_ = share;
  }

  int64_t in_features_;
  int64_t rows_ = 0;
  double total_ = 0.0;  // sum of the weights of all rows
  bool weighted_ = false;
  mutable double applied_ = 1.0;  // the share that second_moment_ is already multiplied by
  mutable bool mirrored_ = true;
  mutable std::mutex mutex_;
  Tensor sum_, abs_sum_;
  mutable Tensor second_moment_;
};

// `device` gives this constructor the arguments of the reference's; only the CPU is accepted here.
std::unique_ptr<ActivationStats> make_stats(int64_t in_features, const py::object& device) {
  const std::string name = py::str(device);
  AWQ_CHECK(at::Device(name).is_cpu(), kInit, "device", "cpu", name);
  return std::make_unique<ActivationStats>(in_features);
}

}  // namespace

void bind_stats(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<ActivationStats>(
      m, "ActivationStats",
      "Streaming statistics of the rows that enter a Linear: sums of x and |x|, X^T X, row count.\n\n"
      "With weights w: sums of w x, sqrt(w) |x| and w x x^T, all divided by the mean weight when they are read.\n"
      "NaN and infinity in a row show up in the sums: check those.")
      .def(py::init(&make_stats), py::arg("in_features"), py::arg("device") = "cpu")
      .def("update", &ActivationStats::update, py::arg("x"), py::arg("mask") = py::none(),
           py::arg("weights") = py::none(), Release(),
           "Add the rows of x [..., K] fp32/fp16/bf16; mask bool, one element a row: rows where it is False do not "
           "count.\nweights fp32, one a row, >= 0, by which the rows count; None: all 1.")
      .def("sum", &ActivationStats::sum, "Sum over rows of x: fp64 [K]. Without weights the accumulator itself.")
      .def("abs_sum", &ActivationStats::abs_sum,
           "Sum over rows of |x|: fp64 [K]. Without weights the accumulator itself.")
      .def("second_moment", &ActivationStats::second_moment, Release(),
           "X^T X, symmetric: fp32 [K, K]. The accumulator itself, no copy: after another update() call this again.")
      .def_property_readonly("rows", &ActivationStats::rows, "Rows counted so far.")
      .def_property_readonly("in_features", &ActivationStats::in_features);
}

}  // namespace awq
