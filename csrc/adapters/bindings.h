// Parts of the module, each in the file of its name: they check arguments, turn tensors into pointers and release the
// GIL.
#pragma once

#include <torch/csrc/utils/pybind.h>  // not torch/extension.h, which takes twice as long to compile

namespace awq {

void bind_quantize(pybind11::module_& m);
void bind_tiles(pybind11::module_& m);
void bind_search(pybind11::module_& m);
void bind_gptq(pybind11::module_& m);
void bind_refine(pybind11::module_& m);
void bind_learned(pybind11::module_& m);
void bind_stats(pybind11::module_& m);
void bind_cuda(pybind11::module_& m);

}  // namespace awq
