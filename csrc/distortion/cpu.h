#ifndef JKA_DISTORTION_CPU_H_
#define JKA_DISTORTION_CPU_H_

#include "common/cpu.h"
#include "distortion/distortion.h"

namespace knn {

#define KNN_DECLARE(isa)                                                \
  namespace isa {                                                       \
  template <class T>                                                    \
  CpuKernel<Distortion<T>> DistortionKernel(const Distortion<T>& args); \
  CpuKernel<RayOffsets> RayOffsetsKernel();                             \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // JKA_DISTORTION_CPU_H_
