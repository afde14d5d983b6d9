#ifndef JKA_KNN_INVERT_CPU_H_
#define JKA_KNN_INVERT_CPU_H_

#include "common/cpu.h"
#include "knn/invert/invert.h"

namespace knn {

#define KNN_DECLARE(isa)            \
  namespace isa {                   \
  CpuKernel<Invert> InvertKernel(); \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // JKA_KNN_INVERT_CPU_H_
