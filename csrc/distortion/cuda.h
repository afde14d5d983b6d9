#ifndef JKA_DISTORTION_CUDA_H_
#define JKA_DISTORTION_CUDA_H_

#include <cuda_runtime_api.h>

#include "distortion/distortion.h"

namespace knn {

template <class T>
cudaError_t LaunchDistortion(const Distortion<T>& args, cudaStream_t stream);

cudaError_t LaunchRayOffsets(const RayOffsets& args, cudaStream_t stream);

}  // namespace knn

#endif  // JKA_DISTORTION_CUDA_H_
