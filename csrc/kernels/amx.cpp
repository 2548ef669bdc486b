// Intel's tile registers beside AVX-512. Without the products of bf16 in vectors, which on these processors take five
// cycles each: slower than fp32 FMA.
#include "kernels.h"

#include <immintrin.h>
#include <cstddef>

#define AWQ_LEVEL_AVX512
#define AWQ_LEVEL_VNNI
#define AWQ_LEVEL_AMX
#include "table-inl.h"

namespace awq {
constinit const KernelTable kAmxKernels = make_table();
}  // namespace awq
