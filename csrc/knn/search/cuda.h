#ifndef JKA_KNN_SEARCH_CUDA_H_
#define JKA_KNN_SEARCH_CUDA_H_

#include <cuda_runtime_api.h>

#include "knn/search/search.h"

namespace knn {

// 1 <= K <= min(P, kCudaMaxK). `scratch` is aligned to 16 bytes; cudaErrorMemoryAllocation if `bytes` of it are too
// few.
template <class T>
cudaError_t LaunchSearch(const Search<T>& args, MetricKind metric, void* scratch, int64_t bytes, cudaStream_t stream);

// Its three ways. The first needs args.index, the second float and K <= kFilterMaxK.
template <class T>
cudaError_t LaunchTreeSearch(const Search<T>& args, MetricKind metric, void* scratch, int64_t bytes,
                             cudaStream_t stream);
cudaError_t LaunchFilterSearch(const Search<float>& args, MetricKind metric, void* scratch, int64_t bytes,
                               cudaStream_t stream);
template <class T>
cudaError_t LaunchExhaustiveSearch(const Search<T>& args, MetricKind metric, cudaStream_t stream);

}  // namespace knn

#endif  // JKA_KNN_SEARCH_CUDA_H_
