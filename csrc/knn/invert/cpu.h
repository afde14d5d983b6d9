#ifndef KNN_INVERT_CPU_H_
#define KNN_INVERT_CPU_H_

#include "common/cpu.h"
#include "invert/invert.h"

namespace knn {

#define KNN_DECLARE(isa)            \
  namespace isa {                   \
  CpuKernel<Invert> InvertKernel(); \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // KNN_INVERT_CPU_H_
