// Parts of the module that have a file of their own.
#pragma once

#include <torch/extension.h>

namespace awq {

void bind_stats(pybind11::module_& m);

}  // namespace awq
