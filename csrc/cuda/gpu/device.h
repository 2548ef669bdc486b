// The definitions of cuda/device.h for nvcc.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace awq::cuda {

extern __shared__ __align__(16) unsigned char shared_bytes_of_block[];

__device__ __forceinline__ unsigned char* shared_memory() { return shared_bytes_of_block; }
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

template <class T>
__device__ __forceinline__ T warp_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

template <class T>
__device__ __forceinline__ T warp_from(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

__device__ __forceinline__ void copy16(void* to, const void* from, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy16_if(bool there, void* to, const void* from, int bytes) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %3, 0; @p cp.async.cg.shared.global [%0], [%1], 16, %2; }\n" ::"r"(address),
      "l"(from), "r"(bytes), "r"(static_cast<int>(there))
      : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kOpen>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kOpen) : "memory");
}

__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float half_value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ float bf16_value(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
__device__ __forceinline__ uint16_t half_bits(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ uint16_t bf16_bits(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

__device__ __forceinline__ uint32_t half_pair(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

__device__ __forceinline__ uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t numbers) {
  return __byte_perm(low, high, numbers);
}

// Of the current device; `otherwise` where it cannot be asked.
inline int64_t device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = otherwise;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

inline int64_t multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, 1); }
// 48 KiB is what every device has.
inline int64_t shared_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 * 1024); }

template <class... Parameters, class... Arguments>
int64_t launch(void* stream, Blocks blocks, int threads, int64_t shared, void (*kernel)(Parameters...),
               Arguments... arguments) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return 0;
  if (shared > 48 * 1024) {
    // All that there is, as no kernel has static shared memory: with `shared` in its place, a thread that launches the
    // same kernel with less could take it back before this one launches.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_limit()));
    if (error != cudaSuccess) return cudaGetLastError();  // and no later launch finds it
  }
  const dim3 grid(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y), static_cast<unsigned>(blocks.z));
  kernel<<<grid, static_cast<unsigned>(threads), static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

}  // namespace awq::cuda
