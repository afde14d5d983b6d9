// Groups pairs by the point they name, on CUDA: a stable sort of pair numbers by point.
//
// Few points: one counting sort. Tiles of pairs are counted, each group's counts summed over the tiles before, and then
// a warp places the pairs of a tile in order. Many points: a radix sort.

#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>

#include "common/cuda.cuh"
#include "knn/invert/cuda.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kThreads = 512;
constexpr int kTurns = 4;                 // pairs of a thread
constexpr int kTile = kTurns * kThreads;  // pairs that a block counts or places
static_assert(kTile == kCountedTile);
constexpr int kColumns = 32;  // groups whose counts a block sums

// The group of pair `number` in entry c of `kept`: its point, or P, behind all points, where there is no neighbour.
__device__ __forceinline__ int32_t GroupOf(const Invert& args, const SplitBatch& split, uint32_t c, uint32_t number) {
  const uint32_t row = static_cast<uint32_t>(args.row), s = number / row;
  const int32_t j = args.idxs[int64_t{Join(split, c, s)} * args.row + (number - s * row)];
  return Names(j, args.P) ? j : static_cast<int32_t>(args.P);
}

// Groups of a thread's pairs in a tile, P + 1 beyond the last pair. All are loaded at once.
__device__ __forceinline__ void GroupsOf(const Invert& args, const SplitBatch& split, uint32_t c, uint32_t tile,
                                         int32_t (&groups)[kTurns]) {
  const uint32_t pairs = static_cast<uint32_t>(args.pairs);
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    const uint32_t number = tile * kTile + t * kThreads + threadIdx.x;
    const int32_t group = GroupOf(args, split, c, min(number, pairs - 1));
    groups[t] = number < pairs ? group : static_cast<int32_t>(args.P) + 1;
  }
}

// counts: [kept, tiles + 1, P + 1]. A block writes the row of its tile.
__global__ void __launch_bounds__(kThreads)
    CountTile(const Invert args, const __grid_constant__ SplitBatch split, uint32_t tiles, int32_t* counts) {
  extern __shared__ int32_t count[];  // [P + 2]
  const uint32_t c = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int groups = static_cast<int>(args.P) + 1;
  for (int g = threadIdx.x; g <= groups; g += kThreads) count[g] = 0;
  int32_t mine[kTurns];
  GroupsOf(args, split, c, tile, mine);
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTurns; ++t) atomicAdd(&count[mine[t]], 1);
  __syncthreads();
  int32_t* row = counts + (int64_t{c} * (tiles + 1) + tile) * groups;
  for (int g = threadIdx.x; g < groups; g += kThreads) row[g] = count[g];
}

// Replaces each count by the sum over the tiles before; the sum over all tiles goes to the last row.
__global__ void __launch_bounds__(kThreads) SumCounts(uint32_t tiles, int groups, uint32_t blocks, int32_t* counts) {
  constexpr int kWarps = kThreads / kColumns;
  __shared__ int32_t sums[kWarps][kColumns];
  const int column = threadIdx.x % kColumns, warp = threadIdx.x / kColumns;
  const int g = blockIdx.x % blocks * kColumns + column;
  int32_t* of_group = counts + int64_t{blockIdx.x / blocks} * (tiles + 1) * groups + g;
  const int64_t first = int64_t{tiles} * warp / kWarps, last = int64_t{tiles} * (warp + 1) / kWarps;
  int32_t sum = 0;
  if (g < groups) {
#pragma unroll 8
    for (int64_t tile = first; tile < last; ++tile) sum += of_group[tile * groups];
  }
  sums[warp][column] = sum;
  __syncthreads();
  if (g >= groups) return;
  sum = 0;
  for (int w = 0; w < warp; ++w) sum += sums[w][column];
  constexpr int kAhead = 8;  // loads in flight before their places are written
  for (int64_t start = first; start < last; start += kAhead) {
    int32_t count[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) count[a] = start + a < last ? of_group[(start + a) * groups] : 0;
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (start + a < last) of_group[(start + a) * groups] = sum;
      sum += count[a];
    }
  }
  if (warp == kWarps - 1) of_group[int64_t{tiles} * groups] = sum;
}

__global__ void __launch_bounds__(kThreads)
    PlaceTile(const Invert args, const __grid_constant__ SplitBatch split, uint32_t tiles, const int32_t* counts) {
  using Scan = cub::BlockScan<int32_t, kThreads>;
  extern __shared__ int32_t next[];  // [P + 2]: where the next pair of each group goes
  // First what placing a pair takes: its group, and pairs of the group among the warp's 32, before it and in all. Then
  // its place.
  __shared__ uint32_t pairs[kTile];
  __shared__ typename Scan::TempStorage scan;
  const uint32_t c = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int groups = static_cast<int>(args.P) + 1, lane = threadIdx.x % kWarp;
  const int32_t* rows = counts + int64_t{c} * (tiles + 1) * groups;

#pragma unroll 8
  for (int g = threadIdx.x; g < groups; g += kThreads) next[g] = rows[int64_t{tiles} * groups + g];
  int32_t mine[kTurns];
  GroupsOf(args, split, c, tile, mine);
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    const unsigned same = __match_any_sync(kFullMask, mine[t]);
    pairs[t * kThreads + threadIdx.x] = mine[t] | __popc(same & ((1u << lane) - 1)) << 16 | __popc(same) << 24;
  }
  __syncthreads();
  // Where groups begin: each thread scans a run of them, of odd length, against bank conflicts.
  const int run = (groups + kThreads - 1) / kThreads | 1, first = min(run * static_cast<int>(threadIdx.x), groups);
  const int last = min(first + run, groups);
  int32_t sum = 0, begin;
  for (int g = first; g < last; ++g) sum += next[g];
  Scan(scan).ExclusiveSum(sum, begin);
  for (int g = first; g < last; ++g) {
    const int32_t count = next[g];
    next[g] = begin;
    begin += count;
  }
  __syncthreads();
#pragma unroll 8
  for (int g = threadIdx.x; g < groups; g += kThreads) {
    if (tile == 0) args.offsets[int64_t{c} * groups + g] = next[g];
    next[g] += rows[int64_t{tile} * groups + g];
  }
  __syncthreads();

  // One warp places all pairs, in order: its steps then wait for shared memory alone, not for barriers between warps.
  if (threadIdx.x < kWarp) {
    constexpr int kAhead = 8;
    for (int start = lane; start < kTile; start += kAhead * kWarp) {
      uint32_t pair[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) pair[a] = pairs[start + a * kWarp];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int32_t group = pair[a] & 0xffff, at = next[group];
        __syncwarp();
        next[group] = at + (pair[a] >> 24);  // the same from all lanes with the group
        pairs[start + a * kWarp] = at + (pair[a] >> 16 & 0xff);
        __syncwarp();
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTurns; ++t) {
    const int i = t * kThreads + threadIdx.x;
    const int64_t number = int64_t{tile} * kTile + i;
    if (number < args.pairs) args.order[c * args.pairs + pairs[i]] = static_cast<int32_t>(number);
  }
}

cudaError_t CountingSort(const Invert& args, int32_t* counts, int64_t bytes, cudaStream_t stream) {
  const int64_t sets = Count(args.kept), tiles = CeilDiv(args.pairs, kTile), groups = args.P + 1;
  const int64_t blocks = sets * tiles, column_blocks = CeilDiv(groups, kColumns);
  if (sets * (tiles + 1) * groups * 4 > bytes) return cudaErrorMemoryAllocation;
  if (cudaError_t error = CheckGrid(blocks + sets * column_blocks); error != cudaSuccess) return error;
  const SplitBatch split = Split(args.batch, args.kept);
  CountTile<<<static_cast<unsigned>(blocks), kThreads, (groups + 1) * 4, stream>>>(args, split, tiles, counts);
  SumCounts<<<static_cast<unsigned>(sets * column_blocks), kThreads, 0, stream>>>(tiles, groups, column_blocks, counts);
  PlaceTile<<<static_cast<unsigned>(blocks), kThreads, (groups + 1) * 4, stream>>>(args, split, tiles, counts);
  return cudaGetLastError();
}

// Key of pair t for the radix sort: the entry of `kept` and the group.
__global__ void Keys(const Invert args, const __grid_constant__ SplitBatch split, int64_t total, uint32_t* keys,
                     int32_t* numbers) {
  const int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= total) return;
  const uint32_t c = static_cast<uint32_t>(t / args.pairs), number = static_cast<uint32_t>(t % args.pairs);
  keys[t] = static_cast<uint32_t>(c * (args.P + 1) + GroupOf(args, split, c, number));
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

cudaError_t RadixSort(const Invert& args, void* scratch, int64_t bytes, cudaStream_t stream) {
  const int64_t total = Count(args.kept) * args.pairs, groups = Count(args.kept) * (args.P + 1);
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

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

cudaError_t LaunchInvert(const Invert& args, void* scratch, int64_t bytes, cudaStream_t stream) {
  using namespace KNN_ISA;
  const int64_t groups = Count(args.kept) * (args.P + 1);
  if (groups == 0) return cudaSuccess;
  if (Count(args.kept) * args.pairs == 0) {
    return cudaMemsetAsync(args.offsets, 0, groups * sizeof(int32_t), stream);
  }
  return args.P <= kMaxCounted ? CountingSort(args, static_cast<int32_t*>(scratch), bytes, stream)
                               : RadixSort(args, scratch, bytes, stream);
}

}  // namespace knn
