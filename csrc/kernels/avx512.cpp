// AVX-512 F, BW, DQ, VL.
#include "kernels.h"

#include <immintrin.h>
#include <cstddef>

#define AWQ_LEVEL_AVX512
#include "table-inl.h"

namespace awq {
constinit const KernelTable kAvx512Kernels = make_table();
}  // namespace awq
