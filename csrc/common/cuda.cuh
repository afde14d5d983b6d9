// What the CUDA kernels share: warps, launches, and batch indices split into kept and summed axes.

#ifndef KNN_COMMON_CUDA_CUH_
#define KNN_COMMON_CUDA_CUH_

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

KNN_FN int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Some batch axes are kept and some summed: an index over the kept ones and one over the summed ones, both row-major,
// give the index over all.
struct SplitBatch {
  int ndim;
  int64_t size[kMaxBatchAxes];
  bool summed[kMaxBatchAxes];
};

inline SplitBatch Split(const Batch& batch, const Batch& kept) {
  SplitBatch split = {};
  split.ndim = batch.ndim;
  for (int a = 0; a < batch.ndim; ++a) {
    split.size[a] = batch.size[a];
    split.summed[a] = kept.size[a] != batch.size[a];
  }
  return split;
}

// Short code, since it is inlined often: 32 bits are enough for entries.
__device__ __forceinline__ uint32_t Join(const SplitBatch& split, uint32_t c, uint32_t s) {
  uint32_t b = 0, step = 1;
#pragma unroll 1
  for (int a = split.ndim - 1; a >= 0; --a) {
    const uint32_t n = static_cast<uint32_t>(split.size[a]), from = split.summed[a] ? s : c, rest = from / n;
    b += (from - rest * n) * step;
    (split.summed[a] ? s : c) = rest;
    step *= n;
  }
  return b;
}

}  // namespace knn::KNN_ISA

#endif  // KNN_COMMON_CUDA_CUH_
