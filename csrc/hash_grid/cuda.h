#ifndef JKA_HASH_GRID_CUDA_H_
#define JKA_HASH_GRID_CUDA_H_

#include <cuda_runtime_api.h>

#include "hash_grid/hash_grid.h"

namespace knn {

// What has the type of features is stored as args.stored says. Scratch: parts of the gradient in x, [groups of levels,
// batch, N, dim], where there are several groups; and `bytes` for sums and what is known of units, if the table's
// gradient is wanted.
template <class T>
cudaError_t LaunchHashGrid(const HashGrid<T, T>& args, T* parts, void* scratch, int64_t bytes, cudaStream_t stream);

}  // namespace knn

#endif  // JKA_HASH_GRID_CUDA_H_
