// Builds the index of index.h on CUDA: one radix sort of all clouds' points along a curve, then a warp per node.

#include <cub/device/device_radix_sort.cuh>

#include "knn/index/bounds.h"
#include "knn/index/cloud.cuh"
#include "knn/index/cuda.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kThreads = 256;

// A sort key, from its highest bit on: the cloud; whether the point is left out; whether it has no bound; how small its
// metric is; its place on the curve, without as many of its lowest bits as clouds leave no room for. One bound for
// metrics of very different sizes would be loose for most of them, so sizes that differ by more than 2^kLogSizes,
// starting from the largest, go apart.
constexpr int kSizeBits = 4, kPlaceBits = 3 * kCurveBits, kPointBits = kPlaceBits + kSizeBits + 2;
constexpr uint64_t kLeftOut = uint64_t{1} << (kPointBits - 1), kUnbounded = kLeftOut >> 1;
constexpr float kLogSizes = 6;

static_assert(kLeafSize == kWarp && kFanOut == kWarp, "a lane holds a point of a leaf, or a node of a group");

template <class M, class T>
__global__ void __launch_bounds__(kThreads) Keys(const BuildIndex<T> args, unsigned blocks_per_cloud, int drop,
                                                 const Extent* extents, uint64_t* keys, int32_t* points) {
  __shared__ Extent extent;
  const unsigned c = blockIdx.x / blocks_per_cloud;
  const int64_t j = int64_t{blockIdx.x % blocks_per_cloud} * kThreads + threadIdx.x;
  if (threadIdx.x < kWarp) {
    const Extent of_cloud = Together(extents + int64_t{c} * kParts);
    if (threadIdx.x == 0) extent = of_cloud;
  }
  __syncthreads();
  if (j >= args.P) return;
  const Cloud<M, T> cloud(args, args.batch, c);
  uint64_t key = kLeftOut;
  if (j < cloud.length) {
    const Vec3<T> p = cloud.Point(j);
    const auto m = cloud.Parameters(j);
    if (IsFinite<M>(p, m)) {
      const Vec3<float> at = {static_cast<float>(p.x), static_cast<float>(p.y), static_cast<float>(p.z)};
      const float smaller = log2f(extent.Magnitude()) - log2f(MagnitudeOf<M>(m));
      const unsigned size = static_cast<unsigned>(fminf(fmaxf(smaller / kLogSizes, 0.0f), (1 << kSizeBits) - 1));
      key = uint64_t{size} << kPlaceBits | PlaceOnCurve(at, extent.Low(), extent.High());
      if (HasNegative<M>(m)) key |= kUnbounded;
    } else if (HasNegative<M>(m)) {
      key = kUnbounded;
    }
  }
  keys[c * args.P + j] = uint64_t{c} << (kPointBits - drop) | key >> drop;
  points[c * args.P + j] = static_cast<int32_t>(j);
}

// What lane `lane` says of its part of a node, joined over the warp and written as node i of a level.
template <class T>
struct NodeBounds {
  T low[3] = {T(INFINITY), T(INFINITY), T(INFINITY)}, high[3] = {-T(INFINITY), -T(INFINITY), -T(INFINITY)};
  T base = T(INFINITY), factor[4] = {T(INFINITY), T(INFINITY), T(INFINITY), T(INFINITY)};  // lambda, axis

  __device__ __forceinline__ void Write(T* groups, int64_t i) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const auto least = [step](T x) { return fmin(x, __shfl_xor_sync(kFullMask, x, step)); };
      for (int a = 0; a < 3; ++a) low[a] = least(low[a]), high[a] = -least(-high[a]);
      base = least(base);
      for (int a = 0; a < 4; ++a) factor[a] = least(factor[a]);
    }
    const int lane = threadIdx.x % kWarp;
    T mine = 0;
#pragma unroll
    for (int a = 0; a < 3; ++a) {
      mine = lane == kLow + a ? low[a] : lane == kHigh + a ? high[a] : mine;
    }
#pragma unroll
    for (int a = 0; a < 4; ++a) mine = lane == kLambda + a ? factor[a] : mine;
    // The box of a node without points, or without a bound, is a point: its bound is then its base, whatever the query.
    if (base != 0) mine = 0;
    if (lane == kBase) mine = base;
    if (lane < kNodeRows) groups[(i / kFanOut * kNodeRows + lane) * kFanOut + i % kFanOut] = mine;
  }
};

// A warp per leaf, and per place for one in the last group.
template <class M, class T>
__global__ void __launch_bounds__(kThreads)
    Leaves(const BuildIndex<T> args, const IndexShape shape, int64_t warps_per_cloud, int64_t warps, int drop,
           const uint64_t* keys, const int32_t* points) {
  constexpr int kRows = kLeafRows<M::kKind>;
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (warp >= warps) return;
  const int64_t c = warp / warps_per_cloud, leaf = warp % warps_per_cloud;
  const int64_t at = leaf * kLeafSize + lane;
  const bool exists = at < args.P && (keys[c * args.P + at] & kLeftOut >> drop) == 0;
  NodeBounds<T> node;
  T rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) rows[r] = r < 3 ? T(INFINITY) : T(0);
  int32_t j = -1;
  if (exists) {
    j = points[c * args.P + at];
    const Cloud<M, T> cloud(args, args.batch, c);
    const Vec3<T> p = cloud.Point(j);
    const auto m = cloud.Parameters(j);
    rows[0] = p.x, rows[1] = p.y, rows[2] = p.z;
    const T* of_metric = reinterpret_cast<const T*>(&m);
#pragma unroll
    for (int r = 3; r < kRows; ++r) rows[r] = of_metric[r - 3];
#pragma unroll
    for (int a = 0; a < 3; ++a) node.low[a] = node.high[a] = rows[a];
    if (!HasNegative<M>(m)) {
      const Factors<double> factors = FactorsOf<T>(m);
      node.base = 0;
      node.factor[0] = RoundDown<T>(factors.lambda);
#pragma unroll
      for (int a = 0; a < 3; ++a) node.factor[1 + a] = RoundDown<T>(factors.axis[a]);
    } else {
      node.base = -T(INFINITY);
    }
  }
  node.Write(args.nodes + c * shape.groups * kNodeRows * kFanOut, leaf);
  if (leaf >= shape.leaves) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) args.leaves[((c * shape.leaves + leaf) * kRows + r) * kLeafSize + lane] = rows[r];
  args.order[(c * shape.leaves + leaf) * kLeafSize + lane] = j;
}

// A warp per node of a level above leaves, and per place for one in the last group: what its group says together.
template <class T>
__global__ void __launch_bounds__(kThreads)
    Upper(const BuildIndex<T> args, const IndexShape shape, int level, int64_t warps_per_cloud, int64_t warps) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (warp >= warps) return;
  const int64_t c = warp / warps_per_cloud, i = warp % warps_per_cloud;
  T* groups = args.nodes + c * shape.groups * kNodeRows * kFanOut;
  NodeBounds<T> node;
  if (i < shape.nodes[level]) {
    const T* group = groups + (shape.first_group[level - 1] + i) * kNodeRows * kFanOut + lane;
    const T base = group[kBase * kFanOut];
    if (base != T(INFINITY)) {
      node.base = base;
#pragma unroll
      for (int a = 0; a < 3; ++a) {
        node.low[a] = group[(kLow + a) * kFanOut];
        node.high[a] = group[(kHigh + a) * kFanOut];
      }
#pragma unroll
      for (int a = 0; a < 4; ++a) node.factor[a] = group[(kLambda + a) * kFanOut];
    }
  }
  node.Write(groups + shape.first_group[level] * kNodeRows * kFanOut, i);
}

template <class M, class T>
cudaError_t Launch(const BuildIndex<T>& args, void* scratch, int64_t bytes, cudaStream_t stream) {
  const int64_t clouds = Count(args.batch), total = clouds * args.P;
  if (total == 0) return cudaSuccess;
  const IndexShape shape = ShapeOfIndex(args.P);
  const int64_t key_blocks = CeilDiv(args.P, kThreads),
                places = (shape.first_group[1] - shape.first_group[0]) * kFanOut;
  const int64_t blocks = max(clouds * max(key_blocks, int64_t{kParts}), CeilDiv(clouds * places * kWarp, kThreads));
  if (cudaError_t error = CheckGrid(max(blocks, total)); error != cudaSuccess) return error;

  // Scratch: keys and points twice, extents, and what the sort itself needs.
  auto* keys = static_cast<uint64_t*>(scratch);
  auto* points = reinterpret_cast<int32_t*>(keys + 2 * total);
  auto* extents = reinterpret_cast<Extent*>(points + 2 * total);
  const int64_t used = CeilDiv(24 * total + clouds * kParts * int64_t{sizeof(Extent)}, 256) * 256;
  int cloud_bits = 0;
  while ((clouds - 1) >> cloud_bits != 0) ++cloud_bits;
  const int drop = max(0, kPointBits + cloud_bits - 64), bits = kPointBits - drop + cloud_bits;
  cub::DoubleBuffer<uint64_t> key_buffers(keys, keys + total);
  cub::DoubleBuffer<int32_t> point_buffers(points, points + total);
  size_t needed = 0;
  cudaError_t error =
      cub::DeviceRadixSort::SortPairs(nullptr, needed, key_buffers, point_buffers, total, 0, bits, stream);
  if (error != cudaSuccess) return error;
  if (used + static_cast<int64_t>(needed) > bytes) return cudaErrorMemoryAllocation;

  FindExtents<M, T><<<static_cast<unsigned>(clouds * kParts), kExtentThreads, 0, stream>>>(args, args.batch, extents);
  if (error = cudaGetLastError(); error != cudaSuccess) return error;
  Keys<M, T><<<static_cast<unsigned>(clouds * key_blocks), kThreads, 0, stream>>>(
      args, static_cast<unsigned>(key_blocks), drop, extents, keys, points);
  if (error = cudaGetLastError(); error != cudaSuccess) return error;
  error = cub::DeviceRadixSort::SortPairs(static_cast<char*>(scratch) + used, needed, key_buffers, point_buffers, total,
                                          0, bits, stream);
  if (error != cudaSuccess) return error;
  const auto grid = [](int64_t warps) { return static_cast<unsigned>(CeilDiv(warps * kWarp, kThreads)); };
  Leaves<M, T><<<grid(clouds * places), kThreads, 0, stream>>>(args, shape, places, clouds * places, drop,
                                                               key_buffers.Current(), point_buffers.Current());
  if (error = cudaGetLastError(); error != cudaSuccess) return error;
  for (int level = 1; level < shape.levels; ++level) {
    const int64_t of_level = (shape.first_group[level + 1] - shape.first_group[level]) * kFanOut;
    Upper<T><<<grid(clouds * of_level), kThreads, 0, stream>>>(args, shape, level, of_level, clouds * of_level);
    if (error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

template <class T>
cudaError_t LaunchBuildIndex(const BuildIndex<T>& args, MetricKind metric, void* scratch, int64_t bytes,
                             cudaStream_t stream) {
  return metric == MetricKind::kAnisotropic ? KNN_ISA::Launch<KNN_ISA::Anisotropic<T>>(args, scratch, bytes, stream)
                                            : KNN_ISA::Launch<KNN_ISA::Isotropic<T>>(args, scratch, bytes, stream);
}

template cudaError_t LaunchBuildIndex(const BuildIndex<float>&, MetricKind, void*, int64_t, cudaStream_t);
template cudaError_t LaunchBuildIndex(const BuildIndex<double>&, MetricKind, void*, int64_t, cudaStream_t);

}  // namespace knn
