#ifndef KNN_SEARCH_CUDA_H_
#define KNN_SEARCH_CUDA_H_

#include <cuda_runtime_api.h>

#include "search/search.h"

namespace knn {

inline constexpr int kCudaMaxK = 256;

// 1 <= K <= min(P, kCudaMaxK).
template <class T>
cudaError_t LaunchSearch(const Search<T>& args, MetricKind metric, cudaStream_t stream);

}  // namespace knn

#endif  // KNN_SEARCH_CUDA_H_
