#ifndef JKA_MLP_CPU_H_
#define JKA_MLP_CPU_H_

#include "common/cpu.h"
#include "mlp/mlp.h"

namespace knn {

#define KNN_DECLARE(isa)                                 \
  namespace isa {                                        \
  template <class T, class S>                            \
  CpuKernel<Mlp<T, S>> MlpKernel(const Mlp<T, S>& args); \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // JKA_MLP_CPU_H_
