#ifndef JKA_SPLAT_PROJECT_CPU_H_
#define JKA_SPLAT_PROJECT_CPU_H_

#include "common/cpu.h"
#include "splat/project/project.h"

namespace knn {

#define KNN_DECLARE(isa)                                                \
  namespace isa {                                                       \
  template <class T>                                                    \
  CpuKernel<Projection<T>> ProjectionKernel(const Projection<T>& args); \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // JKA_SPLAT_PROJECT_CPU_H_
