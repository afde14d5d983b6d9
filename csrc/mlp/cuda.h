#ifndef JKA_MLP_CUDA_H_
#define JKA_MLP_CUDA_H_

#include <cuda_runtime_api.h>

#include "mlp/mlp.h"

namespace knn {

// All arrays are stored as args.stored says. Scratch: `bytes`, as MlpCudaScratchBytes has it.
cudaError_t LaunchMlp(const Mlp<float, float>& args, void* scratch, int64_t bytes, cudaStream_t stream);

// Whether shared memory of the first device has room for all that kernels do with these widths, of elements of so many
// bytes; where there is no device, whether that of an H100 has.
bool MlpCudaServes(const int64_t* width, int layers, int64_t bytes);

}  // namespace knn

#endif  // JKA_MLP_CUDA_H_
