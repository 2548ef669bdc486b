// The amx level with tile registers in plain C++, to test it on a processor without them. Never chosen by default.
#include "kernels.h"

#include <immintrin.h>
#include <cstddef>

#define AWQ_LEVEL_AVX512
#define AWQ_LEVEL_VNNI
#define AWQ_LEVEL_AMX_EMULATED
#include "table-inl.h"

namespace awq {
constinit const KernelTable kAmxEmulatedKernels = make_table();
}  // namespace awq
