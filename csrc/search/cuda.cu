// Exact search by brute force on CUDA.
//
// A warp owns kQueries queries and visits all points, 32 at a time. A lane holds one point in registers and computes
// its distance to each of the warp's queries, so that arithmetic is what binds: a point costs its loads once for all
// queries, and a query is uniform over the warp. The K best of a query are spread over the lanes as a sorted list,
// which takes any K up to 32·kRows. Lanes whose point beats the K-th best insert one after another, in index order, so
// that ties go to the smaller index; that happens about K (1 + ln(P/K)) times a query.

#include "common/cuda.cuh"
#include "search/cuda.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kWarps = 8;  // of a block; they share tiles of points
constexpr int kTile = 256;

// The K smallest distances of one query: rows of 32, ascending along lanes and then rows. Empty places are +inf, −1.
template <class T, int kRows>
struct Nearest {
  T dist[kRows];
  int index[kRows];

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      dist[r] = T(INFINITY);
      index[r] = -1;
    }
  }

  // The K-th smallest distance, for all lanes.
  __device__ __forceinline__ T Last(int K) const {
    T last = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // selecting after the shuffle keeps the rows in registers
      const T in_row = __shfl_sync(kFullMask, dist[r], (K - 1) % kWarp);
      last = (K - 1) / kWarp == r ? in_row : last;
    }
    return last;
  }

  // Inserts behind everything that is not greater. All lanes pass the same values.
  __device__ __forceinline__ void Insert(T d, int i) {
    const int lane = threadIdx.x % kWarp;
    bool carrying = false;  // what fell out of the row before goes to the front of this one
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int at = carrying ? 0 : __popc(__ballot_sync(kFullMask, dist[r] <= d));
      if (at == kWarp) continue;
      carrying = true;
      const T before = __shfl_up_sync(kFullMask, dist[r], 1), fallen = __shfl_sync(kFullMask, dist[r], kWarp - 1);
      const int before_i = __shfl_up_sync(kFullMask, index[r], 1),
                fallen_i = __shfl_sync(kFullMask, index[r], kWarp - 1);
      dist[r] = lane > at ? before : lane == at ? d : dist[r];
      index[r] = lane > at ? before_i : lane == at ? i : index[r];
      d = fallen;
      i = fallen_i;
    }
  }
};

template <class M>
constexpr int kScalars = 3 + (M::kR > 0 ? M::kSigma + M::kR : 0);  // of a point, as the search needs it; odd

template <class M, class T>
__device__ __forceinline__ typename M::Parameters LoadParameters(const T* sigma, const T* R, int64_t j) {
  return M::Load(sigma == nullptr ? nullptr : sigma + 3 * j, R == nullptr ? nullptr : R + 9 * j);
}

// Copies `count` points' `n` scalars each from array `from` to place `at` of each point in the tile.
template <int kStride, int n, class T>
__device__ __forceinline__ void Stage(T* tile, int at, const T* from, int count) {
  for (int e = threadIdx.x; e < count * n; e += kWarps * kWarp) tile[e / n * kStride + at + e % n] = from[e];
}

// Rarely fewer than K distances are below +inf. Behind them come those that are +inf, then NaN, in index order.
template <class M, class T>
__device__ __noinline__ void AppendNonFinite(Vec3<T> query, const T* p, const T* sigma, const T* R, int64_t length,
                                             int K, int32_t* out) {
  const int lane = threadIdx.x % kWarp;
  int found = 0;
  while (found < K && out[found] >= 0) ++found;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t at = 0; at < length && found < K; at += kWarp) {
      const int64_t j = at + lane;
      bool match = false;
      if (j < length) {
        const T dist = M::Distance(LoadParameters<M>(sigma, R, j), query - Load3(p + 3 * j));
        match = pass == 0 ? dist == T(INFINITY) : dist != dist;
      }
      const unsigned matches = __ballot_sync(kFullMask, match);
      const int place = found + __popc(matches & ((1u << lane) - 1));
      if (match && place < K) out[place] = static_cast<int32_t>(j);
      found += __popc(matches);
    }
  }
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
  const T* p = At(args.p, args.batch, b);
  const T* sigma = M::kR > 0 ? At(args.sigma, args.batch, b) : nullptr;
  const T* R = M::kR > 0 ? At(args.R, args.batch, b) : nullptr;
  const int64_t length = min(max(int64_t{*At(args.lengths, args.batch, b)}, int64_t{0}), args.P);
  const int K = static_cast<int>(args.K);

  Vec3<T> query[kQueries];
  Nearest<T, kRows> nearest[kQueries];
  T last[kQueries];
#pragma unroll
  for (int m = 0; m < kQueries; ++m) {
    // Warps of the last block may have fewer queries; they then repeat the last one and do not store it.
    query[m] = Load3(q + 3 * min(first + m, args.Q - 1));
    nearest[m].Clear();
    last[m] = T(INFINITY);
  }

  for (int64_t start = 0; start < length; start += kTile) {
    const int count = static_cast<int>(min(int64_t{kTile}, length - start));
    __syncthreads();
    Stage<kScalars<M>, 3>(tile, 0, p + 3 * start, count);
    if constexpr (M::kR > 0) {
      Stage<kScalars<M>, 3>(tile, 3, sigma + 3 * start, count);
      Stage<kScalars<M>, 9>(tile, 6, R + 9 * start, count);
    }
    __syncthreads();
    for (int at = 0; at < count; at += kWarp) {
      const bool exists = at + lane < count;
      const T* mine = tile + (exists ? at + lane : 0) * kScalars<M>;
      const Vec3<T> point = Load3(mine);
      const typename M::Parameters m_point = M::kR > 0 ? M::Load(mine + 3, mine + 6) : M::Load(nullptr, nullptr);
#pragma unroll
      for (int m = 0; m < kQueries; ++m) {
        const T dist = M::Distance(m_point, query[m] - point);
        unsigned better = __ballot_sync(kFullMask, exists && dist < last[m]);
        while (better != 0) {
          const int from = __ffs(better) - 1;
          better &= better - 1;
          const T d = __shfl_sync(kFullMask, dist, from);
          if (d < last[m]) {
            nearest[m].Insert(d, static_cast<int>(start) + at + from);
            last[m] = nearest[m].Last(K);
          }
        }
      }
    }
  }

  const int stored = static_cast<int>(min(int64_t{kQueries}, args.Q - first));
  int32_t* out = args.idxs + (b * args.Q + first) * K;
  unsigned incomplete = 0;
#pragma unroll
  for (int m = 0; m < kQueries; ++m) {
    int found = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      found += __popc(__ballot_sync(kFullMask, nearest[m].index[r] >= 0));
      if (m < stored && r * kWarp + lane < K) out[m * K + r * kWarp + lane] = nearest[m].index[r];
    }
    incomplete |= found < K ? 1u << m : 0u;
  }
  for (int m = 0; m < stored; ++m) {
    if ((incomplete >> m & 1) != 0) {
      AppendNonFinite<M>(Load3(q + 3 * (first + m)), p, sigma, R, length, K, out + m * K);
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
cudaError_t LaunchSearch(const Search<T>& args, MetricKind metric, cudaStream_t stream) {
  return metric == MetricKind::kAnisotropic ? KNN_ISA::LaunchForK<KNN_ISA::Anisotropic<T>>(args, stream)
                                            : KNN_ISA::LaunchForK<KNN_ISA::Isotropic<T>>(args, stream);
}

template cudaError_t LaunchSearch(const Search<float>&, MetricKind, cudaStream_t);
template cudaError_t LaunchSearch(const Search<double>&, MetricKind, cudaStream_t);

}  // namespace knn
