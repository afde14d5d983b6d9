// Exact search of all pairs on CUDA, for what the filter (cuda_filter.cu) does not take: float64, and long lists.
//
// A warp owns kQueries queries and visits all points, 32 at a time. A lane holds one point in registers and computes
// its distance to each of the warp's queries, so that arithmetic is what binds: a point costs its loads once for all
// queries, and a query is uniform over the warp.

#include "knn/search/cuda.h"
#include "knn/search/nearest.cuh"

namespace knn::KNN_ISA {
namespace {

constexpr int kWarps = 8;  // of a block; they share tiles of points
constexpr int kTile = 256;

template <class M>
constexpr int kScalars = 3 + (M::kR > 0 ? M::kSigma + M::kR : 0);  // of a point, as the search needs it; odd

// Copies `count` points' `n` scalars each from array `from` to place `at` of each point in the tile.
template <int kStride, int n, class T>
__device__ __forceinline__ void Stage(T* tile, int at, const T* from, int count) {
  for (int e = threadIdx.x; e < count * n; e += kWarps * kWarp) tile[e / n * kStride + at + e % n] = from[e];
}

// Registers are capped so that 32 warps fit on a multiprocessor where lists are short: waiting for insertions is what
// has to be hidden.
template <class M, class T, int kRows, int kQueries>
__global__ void __launch_bounds__(kWarps* kWarp, sizeof(T) == 4 && kRows == 1 ? 4 : 2)
    SearchKernel(const Search<T> args, int64_t blocks_per_entry) {
  // A point's scalars lie together; their number is odd, so lanes that read one scalar of 32 points hit 32 banks.
  __shared__ T tile[kTile * kScalars<M>];

  const int lane = threadIdx.x % kWarp;
  const int64_t b = blockIdx.x / blocks_per_entry;
  const int64_t first = ((blockIdx.x % blocks_per_entry) * kWarps + threadIdx.x / kWarp) * kQueries;
  const T* q = At(args.q, args.batch, b);
  const Cloud<M, T> cloud(args, args.batch, b);
  const int K = static_cast<int>(args.K);

  Vec3<T> query[kQueries];
  Nearest<T, kRows> nearest[kQueries];
  Neighbour<T> last[kQueries];
#pragma unroll
  for (int m = 0; m < kQueries; ++m) {
    // Warps of the last block may have fewer queries; they then repeat the last one and do not store it.
    query[m] = Load3(q + 3 * min(first + m, args.Q - 1));
  }

  for (int64_t start = 0; start < cloud.length; start += kTile) {
    const int count = static_cast<int>(min(int64_t{kTile}, cloud.length - start));
    __syncthreads();
    Stage<kScalars<M>, 3>(tile, 0, cloud.p + 3 * start, count);
    if constexpr (M::kR > 0) {
      Stage<kScalars<M>, 3>(tile, 3, cloud.sigma + 3 * start, count);
      Stage<kScalars<M>, 9>(tile, 6, cloud.R + 9 * start, count);
    }
    __syncthreads();
    for (int at = 0; at < count; at += kWarp) {
      const bool exists = at + lane < count;
      const T* mine = tile + (exists ? at + lane : 0) * kScalars<M>;
      const Vec3<T> point = Load3(mine);
      const typename M::Parameters m_point = M::kR > 0 ? M::Load(mine + 3, mine + 6) : M::Load(nullptr, nullptr);
#pragma unroll
      for (int m = 0; m < kQueries; ++m) {
        Neighbour<T> mine;
        if (exists) mine = {M::Distance(m_point, query[m] - point), static_cast<int>(start) + at + lane};
        const unsigned better = __ballot_sync(kFullMask, mine < last[m]);
        if (better != 0) nearest[m].Take(mine, better, K, last[m]);
      }
    }
  }

  const int stored = static_cast<int>(min(int64_t{kQueries}, args.Q - first));
  int32_t* out = args.idxs + (b * args.Q + first) * K;
#pragma unroll
  for (int m = 0; m < kQueries; ++m) {
    if (m >= stored) break;
    const int found = nearest[m].Store(K, out + m * K);
    if (found < K) {
      __syncwarp();
      AppendNonFinite(query[m], cloud, found, K, out + m * K);
    }
  }
}

template <class M, class T, int kRows, int kQueries>
cudaError_t Launch(const Search<T>& args, cudaStream_t stream) {
  const int64_t per_entry = CeilDiv(args.Q, kWarps * kQueries);
  const int64_t blocks = Count(args.batch) * per_entry;
  if (blocks == 0) return cudaSuccess;
  if (cudaError_t error = CheckGrid(blocks); error != cudaSuccess) return error;
  SearchKernel<M, T, kRows, kQueries><<<static_cast<unsigned>(blocks), kWarps * kWarp, 0, stream>>>(args, per_entry);
  return cudaGetLastError();
}

template <class M, class T>
cudaError_t LaunchForK(const Search<T>& args, cudaStream_t stream) {
  if (args.K <= kWarp) return Launch<M, T, 1, 4>(args, stream);
  if (args.K <= 2 * kWarp) return Launch<M, T, 2, 4>(args, stream);
  if (args.K <= 4 * kWarp) return Launch<M, T, 4, 2>(args, stream);
  return Launch<M, T, 8, 2>(args, stream);
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

template <class T>
cudaError_t LaunchExhaustiveSearch(const Search<T>& args, MetricKind metric, cudaStream_t stream) {
  return metric == MetricKind::kAnisotropic ? KNN_ISA::LaunchForK<KNN_ISA::Anisotropic<T>>(args, stream)
                                            : KNN_ISA::LaunchForK<KNN_ISA::Isotropic<T>>(args, stream);
}

template cudaError_t LaunchExhaustiveSearch(const Search<float>&, MetricKind, cudaStream_t);
template cudaError_t LaunchExhaustiveSearch(const Search<double>&, MetricKind, cudaStream_t);

}  // namespace knn
