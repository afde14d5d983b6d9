#ifndef JKA_KNN_AGGREGATE_CUDA_H_
#define JKA_KNN_AGGREGATE_CUDA_H_

#include <cuda_runtime_api.h>

#include "knn/aggregate/aggregate.h"

namespace knn {

template <class T, class TF>
cudaError_t LaunchAggregate(const Aggregate<T, TF>& args, MetricKind metric, AggregateRole role, cudaStream_t stream);

}  // namespace knn

#endif  // JKA_KNN_AGGREGATE_CUDA_H_
