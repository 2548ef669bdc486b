// The amx level without intrinsics of any kind, to test it on every x86-64 processor. Never chosen by default.
#include "kernels.h"

#include <cstddef>

#define AWQ_LEVEL_SCALAR
#define AWQ_LEVEL_AMX_EMULATED
#include "table-inl.h"

namespace awq {
constinit const KernelTable kAmxPlainKernels = make_table();
}  // namespace awq
