#ifndef JKA_KNN_INDEX_CUDA_H_
#define JKA_KNN_INDEX_CUDA_H_

#include <cuda_runtime_api.h>

#include "knn/index/index.h"

namespace knn {

// `scratch` is aligned to 16 bytes; cudaErrorMemoryAllocation if `bytes` of it are too few.
template <class T>
cudaError_t LaunchBuildIndex(const BuildIndex<T>& args, MetricKind metric, void* scratch, int64_t bytes,
                             cudaStream_t stream);

}  // namespace knn

#endif  // JKA_KNN_INDEX_CUDA_H_
