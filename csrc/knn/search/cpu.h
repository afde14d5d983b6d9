#ifndef JKA_KNN_SEARCH_CPU_H_
#define JKA_KNN_SEARCH_CPU_H_

#include "common/cpu.h"
#include "knn/search/search.h"

namespace knn {

#define KNN_DECLARE(isa)                                \
  namespace isa {                                       \
  template <class T>                                    \
  CpuKernel<Search<T>> SearchKernel(MetricKind metric); \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // JKA_KNN_SEARCH_CPU_H_
