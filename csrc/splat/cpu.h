#ifndef JKA_SPLAT_CPU_H_
#define JKA_SPLAT_CPU_H_

#include "common/cpu.h"
#include "splat/splat.h"

namespace knn {

#define KNN_DECLARE(isa)                                         \
  namespace isa {                                                \
  template <class T>                                             \
  CpuKernel<Tiles<T>> TilesKernel();                             \
  template <class T>                                             \
  CpuKernel<Splat<T>> SplatForwardKernel(const Splat<T>& args);  \
  template <class T>                                             \
  CpuKernel<Splat<T>> SplatBackwardKernel(const Splat<T>& args); \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // JKA_SPLAT_CPU_H_
