#ifndef JKA_MLP_CUDA_H_
#define JKA_MLP_CUDA_H_

#include <cuda_runtime_api.h>

#include "mlp/mlp.h"

namespace knn {

// All arrays are stored as args.stored says. Scratch: `bytes`, as MlpCudaScratchBytes has it.
template <class T>
cudaError_t LaunchMlp(const Mlp<T, T>& args, void* scratch, int64_t bytes, cudaStream_t stream);

}  // namespace knn

#endif  // JKA_MLP_CUDA_H_
