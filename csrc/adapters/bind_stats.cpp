// ActivationStats: the accumulator that calibration hooks feed.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <mutex>

#include "adapters/bindings.h"
#include "adapters/checks.h"
#include "drivers/stats.h"
#include "kernels/isa.h"

namespace awq {
namespace {

using at::Tensor;

constexpr const char* kInit = "ActivationStats";
constexpr const char* kUpdate = "ActivationStats.update";

int64_t check_in_features(int64_t in_features) {
  AWQ_CHECK(in_features > 0, kInit, "in_features", "a positive number", in_features);
  return in_features;
}

// Methods that take long are called without the GIL; a mutex then keeps two threads from adding to the same sums.
class ActivationStats {
 public:
  explicit ActivationStats(int64_t in_features)
      : in_features_(check_in_features(in_features)),
        sum_(at::zeros({in_features}, at::kDouble)),
        abs_sum_(at::zeros({in_features}, at::kDouble)),
        second_moment_(at::zeros({in_features, in_features}, at::kFloat)) {}

  void update(const Tensor& x, const std::optional<Tensor>& mask) {
    const Dtype dtype = float_dtype(kUpdate, "x", x.scalar_type());
    const Tensor rows = select_rows(x.detach(), mask);
    const std::lock_guard<std::mutex> lock(mutex_);
    add_sums(kernels(), rows.const_data_ptr(), dtype, rows.size(0), in_features_, sum_.mutable_data_ptr<double>(),
             abs_sum_.mutable_data_ptr<double>(), at::get_num_threads());
    add_second_moment(kernels(), rows.const_data_ptr(), dtype, rows.size(0), in_features_,
                      second_moment_.mutable_data_ptr<float>(), at::get_num_threads());
    rows_ += rows.size(0);
    mirrored_ = mirrored_ && rows.size(0) == 0;
  }

  Tensor sum() const { return sum_; }
  Tensor abs_sum() const { return abs_sum_; }

  // Only one triangle is accumulated; the other is filled in when somebody looks.
  Tensor second_moment() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!mirrored_) mirror_upper(second_moment_.mutable_data_ptr<float>(), in_features_, at::get_num_threads());
    mirrored_ = true;
    return second_moment_;
  }

  int64_t rows() const { return rows_; }
  int64_t in_features() const { return in_features_; }

 private:
  // [rows, K], contiguous, without the rows that the mask leaves out.
  Tensor select_rows(const Tensor& x, const std::optional<Tensor>& mask) const {
    AWQ_CHECK(x.device().is_cpu(), kUpdate, "x", "a tensor on the CPU", x.device().str());
    AWQ_CHECK(x.dim() >= 1 && x.size(-1) == in_features_, kUpdate, "x",
              "a last dimension of " + std::to_string(in_features_), x.sizes());
    const Tensor flat = x.reshape({-1, in_features_});
    if (!mask.has_value()) return flat.contiguous();
    check_dtype(kUpdate, "mask", *mask, at::kBool);
    AWQ_CHECK(mask->numel() == flat.size(0), kUpdate, "mask", std::to_string(flat.size(0)) + " elements, one a row",
              mask->numel());
    return flat.index_select(0, mask->cpu().reshape({-1}).nonzero().squeeze(1));
  }

  int64_t in_features_;
  int64_t rows_ = 0;
  mutable bool mirrored_ = true;
  mutable std::mutex mutex_;
  Tensor sum_, abs_sum_;
  mutable Tensor second_moment_;
};

// `device` is there for the sake of one constructor for both implementations: only the CPU is served here.
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
      "NaN and infinity in a row show up in the sums: check those.")
      .def(py::init(&make_stats), py::arg("in_features"), py::arg("device") = "cpu")
      .def("update", &ActivationStats::update, py::arg("x"), py::arg("mask") = py::none(), Release(),
           "Add the rows of x [..., K] fp32/fp16/bf16; mask bool, one element a row: rows where it is False do not "
           "count.")
      .def("sum", &ActivationStats::sum, "Sum over rows of x: fp64 [K]. The accumulator itself, no copy.")
      .def("abs_sum", &ActivationStats::abs_sum, "Sum over rows of |x|: fp64 [K]. The accumulator itself, no copy.")
      .def("second_moment", &ActivationStats::second_moment, Release(),
           "X^T X, symmetric: fp32 [K, K]. The accumulator itself, no copy: after another update() call this again.")
      .def_property_readonly("rows", &ActivationStats::rows, "Rows counted so far.")
      .def_property_readonly("in_features", &ActivationStats::in_features);
}

}  // namespace awq
