#ifndef JKA_SPLAT_PROJECT_CUDA_H_
#define JKA_SPLAT_PROJECT_CUDA_H_

#include <cuda_runtime_api.h>

#include "splat/project/project.h"

namespace knn {

template <class T>
cudaError_t LaunchProjection(const Projection<T>& args, cudaStream_t stream);

}  // namespace knn

#endif  // JKA_SPLAT_PROJECT_CUDA_H_
