// Picks how to search on CUDA.

#include "knn/search/cuda.h"

namespace knn {

template <class T>
cudaError_t LaunchSearch(const Search<T>& args, MetricKind metric, void* scratch, int64_t bytes, cudaStream_t stream) {
  if (args.index.leaves.data != nullptr) return LaunchTreeSearch(args, metric, scratch, bytes, stream);
  if constexpr (sizeof(T) == sizeof(float)) {
    if (args.K <= kFilterMaxK) return LaunchFilterSearch(args, metric, scratch, bytes, stream);
  }
  return LaunchExhaustiveSearch(args, metric, stream);
}

template cudaError_t LaunchSearch(const Search<float>&, MetricKind, void*, int64_t, cudaStream_t);
template cudaError_t LaunchSearch(const Search<double>&, MetricKind, void*, int64_t, cudaStream_t);

}  // namespace knn
