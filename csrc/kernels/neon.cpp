// The baseline of aarch64.
#include "kernels.h"

#include <arm_neon.h>
#include <cstddef>

#define AWQ_LEVEL_NEON
#include "table-inl.h"

namespace awq {
constinit const KernelTable kNeonKernels = make_table();
}  // namespace awq
