// What the library says of itself.
#include "cuda/awq_cuda.h"
#include "cuda/device.h"

int64_t awq_cuda_version() { return 1; }

const char* awq_cuda_error(int64_t error) {
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  return error == 0 ? "no error" : "an error of the emulated GPU";
#endif
}
