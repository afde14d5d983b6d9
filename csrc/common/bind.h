// What the FFI files share: choosing types, running kernels on the CPU pool or a CUDA stream, and listing handlers.

#ifndef JKA_COMMON_BIND_H_
#define JKA_COMMON_BIND_H_

#include <vector>

#include "common/ffi.h"
#include "common/parallel.h"

#ifdef KNN_CUDA
#include <cuda_runtime_api.h>
#endif

namespace knn {

struct Registration {
  const char* platform;  // "cpu" or "cuda"
  const char* name;      // without the package's prefix
  XLA_FFI_Handler* handler;
};

// Of a mask that says which operands are given, or which results wanted; see `bits` of core/ffi.py.
inline bool Bit(int64_t mask, int i) { return (mask >> i & 1) != 0; }

// Runs `kernel` unless reading the buffers failed.
template <class Args>
ffi::Future RunCpu(ffi::ThreadPool& pool, Reader& in, const CpuKernel<Args>& kernel, const Args& args) {
  if (ffi::Error error = in.Done(); error.failure()) return Ready(std::move(error));
  return Run(pool, kernel, args);
}

#ifdef KNN_CUDA

// Launches unless reading the buffers failed. Kernels use XLA's stream alone, never synchronise and never allocate, so
// that XLA can record them into a CUDA graph.
template <class Launch>
ffi::Error RunCuda(Reader& in, Launch&& launch) {
  if (ffi::Error error = in.Done(); error.failure()) return error;
  const cudaError_t status = launch();
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jax_knn_aggregate: CUDA error: ") + cudaGetErrorString(status));
}

#define KNN_CUDA_HANDLER(name, function, binding) \
  XLA_FFI_DEFINE_HANDLER(name, function, binding, {ffi::Traits::kCmdBufferCompatible})

#endif  // KNN_CUDA

}  // namespace knn

#endif  // JKA_COMMON_BIND_H_
