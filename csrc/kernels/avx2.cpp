// AVX2 and FMA.
#include "kernels.h"

#include <immintrin.h>
#include <cstddef>

#define AWQ_LEVEL_AVX2
#include "table-inl.h"

namespace awq {
constinit const KernelTable kAvx2Kernels = make_table();
}  // namespace awq
