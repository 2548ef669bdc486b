// The level that every processor of the architecture runs: no flags beyond the baseline (SSE2 on x86-64).
#include "kernels.h"

#include <cstddef>

#define AWQ_LEVEL_SCALAR
#include "table-inl.h"

namespace awq {
constinit const KernelTable kScalarKernels = make_table();
}  // namespace awq
