#ifndef JKA_KNN_INVERT_CUDA_H_
#define JKA_KNN_INVERT_CUDA_H_

#include <cuda_runtime_api.h>

#include "knn/invert/invert.h"

namespace knn {

// `scratch` is aligned to 16 bytes; cudaErrorMemoryAllocation if `bytes` of it are too few.
cudaError_t LaunchInvert(const Invert& args, void* scratch, int64_t bytes, cudaStream_t stream);

}  // namespace knn

#endif  // JKA_KNN_INVERT_CUDA_H_
