#ifndef KNN_AGGREGATE_CPU_H_
#define KNN_AGGREGATE_CPU_H_

#include "aggregate/aggregate.h"
#include "common/cpu.h"

namespace knn {

#define KNN_DECLARE(isa)                                                              \
  namespace isa {                                                                     \
  template <class T, class TF>                                                        \
  CpuKernel<Aggregate<T, TF>> AggregateKernel(MetricKind metric, AggregateRole role); \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // KNN_AGGREGATE_CPU_H_
