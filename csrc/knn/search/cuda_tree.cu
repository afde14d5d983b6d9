// Exact search through an index on CUDA.
//
// Queries are sorted along the curve, so that warps that run together read the same nodes. A warp takes one query. It
// descends from the root, always to the node with the least bound among those left of a group; lanes hold the nodes of
// a group, and at the end the points of a leaf. It is done where no bound is left within the K-th nearest distance
// found.

#include <cub/device/device_radix_sort.cuh>

#include "knn/search/cuda.h"
#include "knn/search/nearest.cuh"

namespace knn::KNN_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
static_assert(kLeafSize == kWarp && kFanOut == kWarp, "a lane holds a point of a leaf, or a node of a group");

// Sort keys of queries: the batch entry, then as much of the place on the curve as there is room for.
template <class T>
__global__ void __launch_bounds__(kThreads)
    QueryKeys(const Search<T> args, const IndexShape shape, unsigned blocks_per_entry, int place_bits, uint32_t* keys,
              int32_t* numbers) {
  __shared__ Extent extent;
  const unsigned b = blockIdx.x / blocks_per_entry;
  const int64_t i = int64_t{blockIdx.x % blocks_per_entry} * kThreads + threadIdx.x;
  if (threadIdx.x < kWarp) {
    const T* root =
        At(args.index.nodes, args.batch, b) + shape.first_group[shape.levels - 1] * kNodeRows * kFanOut + threadIdx.x;
    const auto row = [root](int r) { return static_cast<float>(root[r * kFanOut]); };
    Extent of_root = {};
    if (row(kBase) == 0) {
      of_root.Cover({row(kLow), row(kLow + 1), row(kLow + 2)}, {row(kHigh), row(kHigh + 1), row(kHigh + 2)}, 0);
    }
    of_root.CoverWarp();
    if (threadIdx.x == 0) extent = of_root;
  }
  __syncthreads();
  if (i >= args.Q) return;
  const Vec3<T> q = Load3(At(args.q, args.batch, b) + 3 * i);
  const Vec3<float> at = {static_cast<float>(q.x), static_cast<float>(q.y), static_cast<float>(q.z)};
  const uint64_t place = PlaceOnCurve(at, extent.Low(), extent.High()) >> (3 * kCurveBits - place_bits);
  keys[b * args.Q + i] = static_cast<uint32_t>(uint64_t{b} << place_bits | place);
  numbers[b * args.Q + i] = static_cast<int32_t>(b * args.Q + i);
}

// The smallest over the lanes. NaN counts as large.
__device__ __forceinline__ float WarpMin(float x) {
#if __CUDA_ARCH__ >= 800
  // Of bounds, which are >= 0 or −inf, the bits are in order.
  return __int_as_float(__reduce_min_sync(kFullMask, __float_as_int(x)));
#else
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fminf(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
#endif
}
__device__ __forceinline__ double WarpMin(double x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = fmin(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

// The bound (1) of index.h for the lane's node of a group. An infinite gap would make it NaN where a factor is 0.
template <class T>
__device__ __forceinline__ T Bound(const T* group, Vec3<T> q) {
  const T* at = group + threadIdx.x % kWarp;
  const auto row = [at](int r) { return __ldg(at + r * kFanOut); };
  const auto gap = [](T low, T q, T high) { return fmin(fmax(fmax(low - q, q - high), T(0)), Precision<T>::kMost); };
  const Vec3<T> g = {gap(row(kLow), q.x, row(kHigh)), gap(row(kLow + 1), q.y, row(kHigh + 1)),
                     gap(row(kLow + 2), q.z, row(kHigh + 2))};
  const T lambda = row(kLambda);
  const Vec3<T> s = {lambda * g.x, lambda * g.y, lambda * g.z};
  const T axis = fmax(fmax(row(kAxis) * g.x, row(kAxis + 1) * g.y), row(kAxis + 2) * g.z);
  return row(kBase) + fmax(Dot(s, s), axis * axis);
}

// A bound on the K-th distance from guesses: the K-th of those that name different points. Only the first 32 count. It
// is one of the points that were given: those in an index may lie elsewhere by now.
template <class M, class T>
__device__ __forceinline__ Neighbour<T> WarmBound(const Cloud<M, T>& cloud, Vec3<T> query, const int32_t* warm,
                                                  int64_t W, int K) {
  const int lane = threadIdx.x % kWarp;
  const int32_t j = lane < W ? warm[lane] : -1;
  const bool first = __ffs(__match_any_sync(kFullMask, j)) - 1 == lane;
  Neighbour<T> mine;
  if (first && Names(j, cloud.length)) mine = Neighbour<T>(cloud.Distance(query, j), j);
  const Neighbour<T> kth = Broadcast(Sorted(mine), K - 1);
  return kth.Exists() ? Neighbour<T>(kth.dist(), INT_MAX) : Neighbour<T>();
}

template <class M, class T, int kRows>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 && kRows == 1 ? 4 : 2)
    TreeKernel(const Search<T> args, const IndexShape shape, int64_t total, const int32_t* numbers) {
  __shared__ T bounds[kWarps][kMaxLevels][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, K = static_cast<int>(args.K);
  const int64_t turn = int64_t{blockIdx.x} * kWarps + warp;
  if (turn >= total) return;
  const unsigned number = numbers[turn], b = number / static_cast<unsigned>(args.Q),
                 i = number % static_cast<unsigned>(args.Q);
  const Vec3<T> query = Load3(At(args.q, args.batch, b) + 3 * int64_t{i});
  const T* leaves = At(args.index.leaves, args.batch, b);
  const int32_t* order = At(args.index.order, args.batch, b);
  const T* nodes = At(args.index.nodes, args.batch, b);
  const Cloud<M, T> cloud(args, args.batch, b);

  Nearest<T, kRows> nearest;
  Neighbour<T> last, limit;  // `last` bounds the K-th, and is at most `limit`
  if (kRows == 1 && args.W >= K) {
    limit = WarmBound<M, T>(cloud, query, At(args.warm, args.batch, b) + i * args.W, args.W, K);
    last = limit;
  }

  int level = shape.levels;
  int64_t group = 0;  // of the level
  const auto descend = [&](int64_t node) {
    group = node;
    --level;
    const T bound = Bound(nodes + (shape.first_group[level] + group) * kNodeRows * kFanOut, query);
    bounds[warp][level][lane] = lane < shape.NodesIn(level, group) ? bound : T(INFINITY);
  };
  descend(0);
  while (true) {
    const T mine = bounds[warp][level][lane], least = WarpMin(mine);
    // A bound of +inf is that of a node without points, or whose points all are at +inf.
    if (!(least <= last.dist() + kUnderflow<T>) || least == T(INFINITY)) {
      if (++level < shape.levels) {
        group /= kFanOut;
        continue;
      }
      if (!limit.Exists() || nearest.Last(K).Exists()) break;
      // No K points are within the bound of the guesses: it was none. Without it, then.
      limit = last = Neighbour<T>{};
      nearest = {};
      descend(0);
      continue;
    }
    const int from = __ffs(__ballot_sync(kFullMask, mine == least)) - 1;
    if (lane == from) bounds[warp][level][lane] = T(INFINITY);  // done
    const int64_t node = group * kFanOut + from;
    if (level > 0) {
      descend(node);
      continue;
    }
    constexpr int kLeafScalars = kLeafRows<M::kKind>;
    const T* at = leaves + node * kLeafScalars * kLeafSize + lane;
    T row[kLeafScalars];
#pragma unroll
    for (int r = 0; r < kLeafScalars; ++r) row[r] = __ldg(at + r * kLeafSize);
    const T dist = M::Distance(M::Load(M::kR > 0 ? row + 3 : nullptr, M::kR > 0 ? row + 6 : nullptr),
                               query - Vec3<T>{row[0], row[1], row[2]});
    if (__any_sync(kFullMask, dist <= last.dist())) {
      // An index may have points that the search's own lengths leave out, and numbers that no builder wrote.
      const int32_t j = order[node * kLeafSize + lane];
      Neighbour<T> found;
      if (Names(j, cloud.length)) found = Neighbour<T>(dist, j);
      const unsigned better = __ballot_sync(kFullMask, found < last);
      if (better != 0) nearest.Take(found, better, K, last);
      if (limit < last) last = limit;
    }
  }
  int32_t* out = args.idxs + int64_t{number} * K;
  const int found = nearest.Store(K, out);
  if (found < K) {
    __syncwarp();
    AppendNonFinite(query, cloud, found, K, out);
  }
}

template <class M, class T>
cudaError_t Launch(const Search<T>& args, void* scratch, int64_t bytes, cudaStream_t stream) {
  const int64_t entries = Count(args.batch), total = entries * args.Q;
  if (total == 0) return cudaSuccess;
  const IndexShape shape = ShapeOfIndex(args.P);
  const int64_t per_entry = CeilDiv(args.Q, kThreads), blocks = CeilDiv(total, kWarps);
  if (cudaError_t error = CheckGrid(max(total, entries * per_entry)); error != cudaSuccess) return error;
  int entry_bits = 0;
  while ((entries - 1) >> entry_bits != 0) ++entry_bits;
  const int place_bits = max(0, 32 - entry_bits);  // never beyond 31 entry bits: total < 2³¹

  // Scratch: keys and numbers twice, and what the sort itself needs.
  auto* keys = static_cast<uint32_t*>(scratch);
  auto* numbers = reinterpret_cast<int32_t*>(keys + 2 * total);
  const int64_t used = CeilDiv(16 * total, 256) * 256;
  cub::DoubleBuffer<uint32_t> key_buffers(keys, keys + total);
  cub::DoubleBuffer<int32_t> number_buffers(numbers, numbers + total);
  size_t needed = 0;
  cudaError_t error = cub::DeviceRadixSort::SortPairs(nullptr, needed, key_buffers, number_buffers, total, 0,
                                                      place_bits + entry_bits, stream);
  if (error != cudaSuccess) return error;
  if (used + static_cast<int64_t>(needed) > bytes) return cudaErrorMemoryAllocation;

  QueryKeys<T><<<static_cast<unsigned>(entries * per_entry), kThreads, 0, stream>>>(
      args, shape, static_cast<unsigned>(per_entry), place_bits, keys, numbers);
  if (error = cudaGetLastError(); error != cudaSuccess) return error;
  error = cub::DeviceRadixSort::SortPairs(static_cast<char*>(scratch) + used, needed, key_buffers, number_buffers,
                                          total, 0, place_bits + entry_bits, stream);
  if (error != cudaSuccess) return error;
  const auto launch = [&](auto rows) {
    TreeKernel<M, T, decltype(rows)::value>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args, shape, total, number_buffers.Current());
    return cudaGetLastError();
  };
  if (args.K <= kWarp) return launch(std::integral_constant<int, 1>());
  if (args.K <= 2 * kWarp) return launch(std::integral_constant<int, 2>());
  if (args.K <= 4 * kWarp) return launch(std::integral_constant<int, 4>());
  return launch(std::integral_constant<int, 8>());
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

template <class T>
cudaError_t LaunchTreeSearch(const Search<T>& args, MetricKind metric, void* scratch, int64_t bytes,
                             cudaStream_t stream) {
  return metric == MetricKind::kAnisotropic ? KNN_ISA::Launch<KNN_ISA::Anisotropic<T>>(args, scratch, bytes, stream)
                                            : KNN_ISA::Launch<KNN_ISA::Isotropic<T>>(args, scratch, bytes, stream);
}

template cudaError_t LaunchTreeSearch(const Search<float>&, MetricKind, void*, int64_t, cudaStream_t);
template cudaError_t LaunchTreeSearch(const Search<double>&, MetricKind, void*, int64_t, cudaStream_t);

}  // namespace knn
