#ifndef JKA_KNN_AGGREGATE_CPU_H_
#define JKA_KNN_AGGREGATE_CPU_H_

#include "common/cpu.h"
#include "knn/aggregate/aggregate.h"

namespace knn {

#define KNN_DECLARE(isa)                                                                                            \
  namespace isa {                                                                                                   \
  template <class T, class TF>                                                                                      \
  CpuKernel<Aggregate<T, TF>> AggregateKernel(MetricKind metric, AggregateRole role, const Aggregate<T, TF>& args); \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // JKA_KNN_AGGREGATE_CPU_H_
