// Groups pairs by the point they name, on CUDA: a stable radix sort of pair numbers by point.

#include <cub/device/device_radix_sort.cuh>

#include "common/cuda.cuh"
#include "invert/cuda.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kThreads = 256;

// Key of pair t: the entry of `kept` and the point; a pair without neighbour comes behind all points of its entry.
__global__ void Keys(const Invert args, const SplitBatch split, int64_t total, uint32_t* keys, int32_t* numbers) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= total) return;
  const int64_t c = t / args.pairs, number = t % args.pairs;
  const int32_t j = args.idxs[Join(split, c, number / args.row) * args.row + number % args.row];
  const bool exists = j >= 0 && j < args.P;
  keys[t] = static_cast<uint32_t>(c * (args.P + 1) + (exists ? j : args.P));
  numbers[t] = static_cast<int32_t>(number);
}

// offsets[k] is where keys of at least k begin. Found by bisection, since runs of points without pairs may be long.
__global__ void Offsets(const Invert args, int64_t total, int64_t groups, const uint32_t* keys) {
  const int64_t k = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (k >= groups) return;
  int64_t low = 0, high = total;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < k) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  args.offsets[k] = static_cast<int32_t>(low - k / (args.P + 1) * args.pairs);
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

cudaError_t LaunchInvert(const Invert& args, void* scratch, int64_t bytes, cudaStream_t stream) {
  using namespace KNN_ISA;
  const int64_t total = Count(args.kept) * args.pairs, groups = Count(args.kept) * (args.P + 1);
  if (groups == 0) return cudaSuccess;
  if (total == 0) return cudaMemsetAsync(args.offsets, 0, groups * sizeof(int32_t), stream);
  const int64_t blocks = CeilDiv(total, kThreads), group_blocks = CeilDiv(groups, kThreads);
  if (cudaError_t error = CheckGrid(blocks + group_blocks); error != cudaSuccess) return error;

  // Scratch: keys twice, pair numbers once (the result is their other buffer), and what the sort itself needs.
  auto* keys = static_cast<uint32_t*>(scratch);
  auto* numbers = reinterpret_cast<int32_t*>(keys + 2 * total);
  const int64_t used = (3 * total * 4 + 255) / 256 * 256;
  int bits = 1;
  while (bits < 32 && (groups - 1) >> bits != 0) ++bits;
  cub::DoubleBuffer<uint32_t> key_buffers(keys, keys + total);
  cub::DoubleBuffer<int32_t> number_buffers(numbers, args.order);
  size_t needed = 0;
  cudaError_t error =
      cub::DeviceRadixSort::SortPairs(nullptr, needed, key_buffers, number_buffers, total, 0, bits, stream);
  if (error != cudaSuccess) return error;
  if (used + static_cast<int64_t>(needed) > bytes) return cudaErrorMemoryAllocation;

  Keys<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args, Split(args.batch, args.kept), total, keys,
                                                               numbers);
  if (error = cudaGetLastError(); error != cudaSuccess) return error;
  error = cub::DeviceRadixSort::SortPairs(static_cast<char*>(scratch) + used, needed, key_buffers, number_buffers,
                                          total, 0, bits, stream);
  if (error != cudaSuccess) return error;
  Offsets<<<static_cast<unsigned>(group_blocks), kThreads, 0, stream>>>(args, total, groups, key_buffers.Current());
  if (error = cudaGetLastError(); error != cudaSuccess) return error;
  if (number_buffers.Current() == args.order) return cudaSuccess;
  return cudaMemcpyAsync(args.order, numbers, total * sizeof(int32_t), cudaMemcpyDeviceToDevice, stream);
}

}  // namespace knn
