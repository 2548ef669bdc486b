// The definitions of cuda/hopper.h for nvcc. All is PTX of sm_90a; of the driver, only the function that encodes tensor
// maps is called, and found at run time, so that the library does not need libcuda to be loaded.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstdint>

namespace awq::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHopper = true;
#else
constexpr bool kHopper = false;
#endif

// A kernel whose code for the device was not compiled for sm_90a must have a launch bound of less than `threads`.
template <class Kernel>
bool runs_on_hopper(Kernel kernel, int device, int threads) {
  int major = 0;
  cudaFuncAttributes attributes;
  const bool asked = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     major == 9 && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
  if (!asked) cudaGetLastError();  // so that no later call finds what this one was told
  return asked && attributes.maxThreadsPerBlock >= threads;
}

// The driver is asked once for each device, as the question is put at every call of a layer.
template <class Kernel>
bool has_hopper(Kernel kernel, int threads) {
  constexpr int kDevices = 64, kYes = 1, kNo = 2;
  static std::atomic<int> known[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (known[device] == 0) known[device] = runs_on_hopper(kernel, device, threads) ? kYes : kNo;
  return known[device] == kYes;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <int kCount>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
}

using Barrier = uint64_t;

__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;\n" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void wait_barrier(Barrier* barrier, int parity) {
  uint32_t ended;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
                 : "=r"(ended)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (ended == 0);
}

using TensorMap = CUtensorMap;

inline int64_t make_tensor_map(TensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t pitch,
                               int box_rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return reinterpret_cast<Encode>(error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(pitch) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const auto ask = [&] {
    return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(data), sizes, strides, box, steps,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult error = ask();
  int device = 0;
  // A thread of the host that has used no GPU yet has no context, which cudaSetDevice gives it.
  if (error == CUDA_ERROR_INVALID_CONTEXT && cudaGetDevice(&device) == cudaSuccess &&
      cudaSetDevice(device) == cudaSuccess)
    error = ask();
  return error == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int column, int row, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

template <int kOpen>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kOpen) : "memory");
}

// The compiler must not read d before the wait, which does not name it: it is told that something may change d there.
template <int kOpen, int kEights>
__device__ __forceinline__ void wait_products(float (&d)[kEights][4]) {
  static_assert(kOpen == 0);
  wait_products<0>();
#pragma unroll
  for (int j = 0; j < kEights; ++j)
    asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
}

#define AWQ_SUMS_1(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define AWQ_SUMS_4(j) AWQ_SUMS_1(j), AWQ_SUMS_1(j + 1), AWQ_SUMS_1(j + 2), AWQ_SUMS_1(j + 3)
// Operands: first d, then a, the descriptor and whether to add.
#define AWQ_PRODUCT_64(TYPE)                                                           \
  asm volatile(                                                                        \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                     \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                      \
      " {"                                                                             \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                 \
      : AWQ_SUMS_4(0), AWQ_SUMS_4(4)                                                   \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define AWQ_PRODUCT_128(TYPE)                                                            \
  asm volatile(                                                                          \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                       \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                       \
      " {"                                                                               \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"   \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"                                   \
      : AWQ_SUMS_4(0), AWQ_SUMS_4(4), AWQ_SUMS_4(8), AWQ_SUMS_4(12)                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))

template <int kEights>
__device__ __forceinline__ void multiply_f16(float (&d)[kEights][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kEights == 8 || kEights == 16);
  if constexpr (kEights == 8)
    AWQ_PRODUCT_64("f16");
  else
    AWQ_PRODUCT_128("f16");
}

template <int kEights>
__device__ __forceinline__ void multiply_bf16(float (&d)[kEights][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(kEights == 8 || kEights == 16);
  if constexpr (kEights == 8)
    AWQ_PRODUCT_64("bf16");
  else
    AWQ_PRODUCT_128("bf16");
}

#undef AWQ_PRODUCT_128
#undef AWQ_PRODUCT_64
#undef AWQ_SUMS_4
#undef AWQ_SUMS_1

}  // namespace awq::cuda
