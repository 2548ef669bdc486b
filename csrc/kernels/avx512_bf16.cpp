// AVX-512 with its products of bytes and of bf16 pairs: the avx512_vnni level with three more kernels.
#include "kernels.h"

#include <immintrin.h>
#include <cstddef>

#define AWQ_LEVEL_AVX512
#define AWQ_LEVEL_VNNI
#define AWQ_LEVEL_BF16
#include "table-inl.h"

namespace awq {
constinit const KernelTable kAvx512Bf16Kernels = make_table();
}  // namespace awq
