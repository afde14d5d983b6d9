#ifndef JKA_HASH_GRID_CPU_H_
#define JKA_HASH_GRID_CPU_H_

#include "common/cpu.h"
#include "hash_grid/hash_grid.h"

namespace knn {

#define KNN_DECLARE(isa)                                                \
  namespace isa {                                                       \
  template <class T, class S>                                           \
  CpuKernel<HashGrid<T, S>> HashGridKernel(const HashGrid<T, S>& args); \
  }
KNN_FOR_EACH_ISA(KNN_DECLARE)
#undef KNN_DECLARE

}  // namespace knn

#endif  // JKA_HASH_GRID_CPU_H_
