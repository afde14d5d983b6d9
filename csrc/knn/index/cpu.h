#ifndef JKA_KNN_INDEX_CPU_H_
#define JKA_KNN_INDEX_CPU_H_

#include "common/cpu.h"
#include "knn/index/index.h"

namespace knn {

#define KNN_DECLARE(isa)                                        \
  namespace isa {                                               \
  template <class T>                                            \
  CpuKernel<BuildIndex<T>> BuildIndexKernel(MetricKind metric); \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // JKA_KNN_INDEX_CPU_H_
