#ifndef JKA_SPLAT_CUDA_H_
#define JKA_SPLAT_CUDA_H_

#include <cuda_runtime_api.h>

#include "splat/splat.h"

namespace knn {

// Scratch serves one batch entry after the other. For lists: kTilesBytesOfItem of splat.h. For gradients, with a row of
// six numbers, twelve where anything moves, and C more if gradients in channels are wanted: a row for each pair that
// lists hold, or 1 + 8 / sizeof(T) rows for each Gaussian, whichever are more; then C numbers for each tile, aligned to
// 256 bytes.
template <class T>
cudaError_t LaunchTiles(const Tiles<T>& args, void* scratch, int64_t bytes, cudaStream_t stream);
template <class T>
cudaError_t LaunchSplatForward(const Splat<T>& args, cudaStream_t stream);
template <class T>
cudaError_t LaunchSplatBackward(const Splat<T>& args, void* scratch, int64_t bytes, cudaStream_t stream);

}  // namespace knn

#endif  // JKA_SPLAT_CUDA_H_
