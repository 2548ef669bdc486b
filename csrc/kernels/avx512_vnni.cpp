// AVX-512 with its products of bytes: the avx512 level with a faster dot_int8.
#include "kernels.h"

#include <immintrin.h>
#include <cstddef>

#define AWQ_LEVEL_AVX512
#define AWQ_LEVEL_VNNI
#include "table-inl.h"

namespace awq {
constinit const KernelTable kAvx512VnniKernels = make_table();
}  // namespace awq
