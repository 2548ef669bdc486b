// Argument checks of everything that Python can call. All messages name the function, the argument, what was expected
// and what was given.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <sstream>

#include "kernels/kernels.h"

namespace awq {

template <class Got>
[[noreturn]] void fail_value(const char* function, const char* argument, const std::string& expected, const Got& got) {
  std::ostringstream text;
  text << function << ": argument '" << argument << "': expected " << expected << ", got " << got;
  TORCH_CHECK_VALUE(false, text.str());
  __builtin_unreachable();
}

template <class Got>
[[noreturn]] void fail_type(const char* function, const char* argument, const std::string& expected, const Got& got) {
  std::ostringstream text;
  text << function << ": argument '" << argument << "': expected " << expected << ", got " << got;
  TORCH_CHECK_TYPE(false, text.str());
  __builtin_unreachable();
}

// ValueError and TypeError in Python.
#define AWQ_CHECK(condition, function, argument, expected, got)             \
  do {                                                                      \
    if (!(condition)) ::awq::fail_value(function, argument, expected, got); \
  } while (false)
#define AWQ_CHECK_TYPE(condition, function, argument, expected, got)       \
  do {                                                                     \
    if (!(condition)) ::awq::fail_type(function, argument, expected, got); \
  } while (false)

// Checks for a dense tensor of the given shape (-1: any length) on the CPU.
inline void check_shape(const char* function, const char* argument, const at::Tensor& t, at::IntArrayRef shape) {
  AWQ_CHECK(t.device().is_cpu() && t.layout() == at::kStrided, function, argument, "a dense tensor on the CPU",
            t.layout() == at::kStrided ? t.device().str() : "a sparse one");
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] == -1 || shape[i] == t.sizes()[i];
  if (same) return;
  std::ostringstream expected;
  expected << "shape " << shape << " (-1: any)";
  std::ostringstream got;
  got << "shape " << t.sizes();
  fail_value(function, argument, expected.str(), got.str());
}

inline void check_dtype(const char* function, const char* argument, const at::Tensor& t, at::ScalarType dtype) {
  AWQ_CHECK_TYPE(t.scalar_type() == dtype, function, argument, c10::toString(dtype), c10::toString(t.scalar_type()));
}

inline Dtype float_dtype(const char* function, const char* argument, at::ScalarType dtype) {
  if (dtype == at::kFloat) return Dtype::f32;
  if (dtype == at::kHalf) return Dtype::f16;
  if (dtype == at::kBFloat16) return Dtype::bf16;
  fail_type(function, argument, "float32, float16 or bfloat16", c10::toString(dtype));
}

inline void check_group_size(const char* function, int64_t group_size) {
  AWQ_CHECK(group_size == -1 || group_size > 0, function, "group_size", "-1 or a positive number", group_size);
}

// The width of codes in the compute layout.
inline int tile_bits(const char* function, int64_t bits) {
  AWQ_CHECK(bits == 4 || bits == 8, function, "bits", "4 or 8", bits);
  return static_cast<int>(bits);
}

}  // namespace awq
