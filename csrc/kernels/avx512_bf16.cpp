// AVX-512 and its products of bf16 pairs: the avx512 level with three more kernels.
#include "kernels.h"

#include <immintrin.h>
#include <cstddef>

#define AWQ_LEVEL_AVX512
#define AWQ_LEVEL_BF16
#include "table-inl.h"

namespace awq {
constinit const KernelTable kAvx512Bf16Kernels = make_table();
}  // namespace awq
