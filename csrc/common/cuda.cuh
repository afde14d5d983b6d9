// What the CUDA kernels share: warps and launches.

#ifndef JKA_COMMON_CUDA_CUH_
#define JKA_COMMON_CUDA_CUH_

#include <cuda_runtime.h>

#include "common/batch.h"

namespace knn::KNN_ISA {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullMask = 0xffffffffu;

template <class T>
__device__ __forceinline__ T WarpSum(T x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

__device__ __forceinline__ int WarpSum(int x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(kFullMask, x);
#else
  return WarpSum<int>(x);
#endif
}

// Blocks are numbered in one dimension, which has room for 2³¹ − 1.
inline cudaError_t CheckGrid(int64_t blocks) {
  return blocks < (int64_t{1} << 31) ? cudaSuccess : cudaErrorInvalidValue;
}

// More than 48 KiB of shared memory must be asked for.
template <class Kernel>
cudaError_t AllowSharedMemory(Kernel* kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace knn::KNN_ISA

#endif  // JKA_COMMON_CUDA_CUH_
