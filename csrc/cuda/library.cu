// What the library says of itself.
#include "cuda/awq_cuda.h"
#include "cuda/device.h"

namespace awq::cuda {
namespace {

__global__ void nothing() {}

}  // namespace
}  // namespace awq::cuda

int64_t awq_cuda_version() { return 3; }

int64_t awq_cuda_usable() {
#ifdef __CUDACC__
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, awq::cuda::nothing);
#else
  return awq::cuda::launch(nullptr, {1}, awq::cuda::kWarp, 0, awq::cuda::nothing);
#endif
}

const char* awq_cuda_error(int64_t error) {
#ifdef __CUDACC__
  return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
  return error == 0 ? "no error" : "an error of the emulated GPU";
#endif
}
