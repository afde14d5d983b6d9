// What the CUDA searches share: the list of a query's nearest points, spread over the lanes of its warp, and the search
// of all points by one warp, for queries that nothing better serves.

#ifndef JKA_KNN_SEARCH_NEAREST_CUH_
#define JKA_KNN_SEARCH_NEAREST_CUH_

#include <climits>

#include "knn/index/cloud.cuh"
#include "knn/search/search.h"

namespace knn::KNN_ISA {

// A neighbour, or an empty place, which is behind all neighbours. Neighbours compare by (distance, index).
template <class T>
class Neighbour {
 public:
  Neighbour() = default;
  // Distances of +inf and NaN are never candidates: they make an empty place.
  __device__ __forceinline__ Neighbour(T dist, int index) {
    if (dist < T(INFINITY)) dist_ = dist, index_ = index;
  }

  __device__ __forceinline__ bool Exists() const { return dist_ < T(INFINITY); }
  __device__ __forceinline__ T dist() const { return dist_; }
  __device__ __forceinline__ int index() const { return index_; }

  friend __device__ __forceinline__ bool operator<(Neighbour a, Neighbour b) {
    return a.dist_ < b.dist_ || (a.dist_ == b.dist_ && a.index_ < b.index_);
  }

  // The neighbour that the shuffle `of` brings.
  template <class Shuffle>
  __device__ __forceinline__ Neighbour Shuffled(Shuffle of) const {
    Neighbour other;
    other.dist_ = of(dist_), other.index_ = of(index_);
    return other;
  }

 private:
  T dist_ = T(INFINITY);
  int index_ = INT_MAX;
};

// In float, one integer that compares as the two do.
template <>
class Neighbour<float> {
 public:
  Neighbour() = default;
  __device__ __forceinline__ Neighbour(float dist, int index) {
    if (dist < INFINITY) {
      const unsigned bits = __float_as_uint(dist + 0.0f);  // one zero
      key_ = uint64_t{bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u)} << 32 | static_cast<unsigned>(index);
    }
  }

  __device__ __forceinline__ bool Exists() const { return key_ < kEmpty; }
  __device__ __forceinline__ float dist() const {
    const unsigned high = static_cast<unsigned>(key_ >> 32);
    return __uint_as_float(high ^ ((high >> 31) != 0 ? 0x80000000u : 0xffffffffu));
  }
  __device__ __forceinline__ int index() const { return static_cast<int>(key_); }

  friend __device__ __forceinline__ bool operator<(Neighbour a, Neighbour b) { return a.key_ < b.key_; }

  template <class Shuffle>
  __device__ __forceinline__ Neighbour Shuffled(Shuffle of) const {
    Neighbour other;
    other.key_ = uint64_t{of(static_cast<unsigned>(key_ >> 32))} << 32 | of(static_cast<unsigned>(key_));
    return other;
  }

 private:
  static constexpr uint64_t kEmpty = uint64_t{0xff800000u} << 32 | INT_MAX;  // +inf
  uint64_t key_ = kEmpty;
};

template <class T>
__device__ __forceinline__ Neighbour<T> ShuffleXor(Neighbour<T> a, int mask) {
  return a.Shuffled([=](auto x) { return __shfl_xor_sync(kFullMask, x, mask); });
}
template <class T>
__device__ __forceinline__ Neighbour<T> Broadcast(Neighbour<T> a, int from) {
  return a.Shuffled([=](auto x) { return __shfl_sync(kFullMask, x, from); });
}

// Keeps the one that comes first of this lane's and its partner's where `first`, else the other.
template <class T>
__device__ __forceinline__ void Exchange(Neighbour<T>& mine, int mask, bool first) {
  const Neighbour<T> other = ShuffleXor(mine, mask);
  if ((other < mine) == first) mine = other;
}

// Ascending along the lanes: a bitonic sort.
template <class T>
__device__ __forceinline__ Neighbour<T> Sorted(Neighbour<T> mine) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int run = 2; run <= kWarp; run *= 2) {
#pragma unroll
    for (int step = run / 2; step > 0; step /= 2) Exchange(mine, step, ((lane & step) == 0) == ((lane & run) == 0));
  }
  return mine;
}

// The K nearest of one query: rows of 32, ascending along lanes and then rows.
template <class T, int kRows>
struct Nearest {
  Neighbour<T> row[kRows];

  // The K-th, for all lanes.
  __device__ __forceinline__ Neighbour<T> Last(int K) const {
    Neighbour<T> last;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // selecting after the shuffle keeps the rows in registers
      const Neighbour<T> in_row = Broadcast(row[r], (K - 1) % kWarp);
      if ((K - 1) / kWarp == r) last = in_row;
    }
    return last;
  }

  // All lanes pass the same one.
  __device__ __forceinline__ void Insert(Neighbour<T> next) {
    const int lane = threadIdx.x % kWarp;
    bool carrying = false;  // what fell out of the row before goes to the front of this one
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int at = carrying ? 0 : __popc(__ballot_sync(kFullMask, row[r] < next));
      if (at == kWarp) continue;
      carrying = true;
      const Neighbour<T> before = row[r].Shuffled([](auto x) { return __shfl_up_sync(kFullMask, x, 1); });
      const Neighbour<T> fallen = Broadcast(row[r], kWarp - 1);
      if (lane >= at) row[r] = lane > at ? before : next;
      next = fallen;
    }
  }

  // Takes 32 that ascend along the lanes. Of two ascending sequences, one of them reversed, the lesser elements are
  // bitonic.
  __device__ __forceinline__ void Merge(Neighbour<T> mine) {
    static_assert(kRows == 1);
    const int lane = threadIdx.x % kWarp;
    mine = ShuffleXor(mine, kWarp - 1);
    if (mine < row[0]) row[0] = mine;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) Exchange(row[0], step, (lane & step) == 0);
  }

  // Takes the lanes' candidates, of which those at `better` (a ballot) come before the K-th, `last`.
  __device__ __forceinline__ void Take(Neighbour<T> mine, unsigned better, int K, Neighbour<T>& last) {
    // Many at once are sorted and merged into the list. One by one is faster for up to about this many.
    constexpr int kFew = 6;
    if constexpr (kRows == 1) {
      if (__popc(better) > kFew) {
        Merge(Sorted((better >> (threadIdx.x % kWarp) & 1) != 0 ? mine : Neighbour<T>{}));
        last = Last(K);
        return;
      }
    }
    while (better != 0) {
      const int from = __ffs(better) - 1;
      better &= better - 1;
      const Neighbour<T> next = Broadcast(mine, from);
      if (next < last) {
        Insert(next);
        last = Last(K);
      }
    }
  }

  // Writes the indices to out[K], −1 in empty places, and returns how many there are.
  __device__ __forceinline__ int Store(int K, int32_t* out) const {
    const int lane = threadIdx.x % kWarp;
    int found = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool exists = row[r].Exists() && r * kWarp + lane < K;
      if (r * kWarp + lane < K) out[r * kWarp + lane] = exists ? row[r].index() : -1;
      found += __popc(__ballot_sync(kFullMask, exists));
    }
    return found;
  }
};

// Rarely fewer than K distances are below +inf. Behind the `found` in `out` come those that are +inf, then NaN, in
// index order.
template <class M, class T>
__device__ __noinline__ void AppendNonFinite(Vec3<T> query, Cloud<M, T> cloud, int found, int K, int32_t* out) {
  const int lane = threadIdx.x % kWarp;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t at = 0; at < cloud.length && found < K; at += kWarp) {
      const int64_t j = at + lane;
      bool match = false;
      if (j < cloud.length) {
        const T dist = cloud.Distance(query, j);
        match = pass == 0 ? dist == T(INFINITY) : dist != dist;
      }
      const unsigned matches = __ballot_sync(kFullMask, match);
      const int place = found + __popc(matches & ((1u << lane) - 1));
      if (match && place < K) out[place] = static_cast<int32_t>(j);
      found += __popc(matches);
    }
  }
}

// One query against all points.
template <class M, int kRows, class T>
__device__ __noinline__ void SearchAll(Vec3<T> query, Cloud<M, T> cloud, int K, int32_t* out) {
  const int lane = threadIdx.x % kWarp;
  Nearest<T, kRows> nearest;
  Neighbour<T> last;
  for (int64_t at = 0; at < cloud.length; at += kWarp) {
    Neighbour<T> mine;
    if (at + lane < cloud.length) mine = {cloud.Distance(query, at + lane), static_cast<int>(at) + lane};
    const unsigned better = __ballot_sync(kFullMask, mine < last);
    if (better != 0) nearest.Take(mine, better, K, last);
  }
  const int found = nearest.Store(K, out);
  if (found < K) {
    __syncwarp();
    AppendNonFinite(query, cloud, found, K, out);
  }
}

}  // namespace knn::KNN_ISA

#endif  // JKA_KNN_SEARCH_NEAREST_CUH_
