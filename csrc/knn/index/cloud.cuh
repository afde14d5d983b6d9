// What the CUDA searches and the index builder share: a cloud's points, its extent, and the curve along which points
// and queries are sorted.

#ifndef JKA_KNN_INDEX_CLOUD_CUH_
#define JKA_KNN_INDEX_CLOUD_CUH_

#include <cfloat>

#include "common/cuda.cuh"
#include "knn/index/index.h"
#include "knn/metric.h"

namespace knn::KNN_ISA {

// The points of one batch entry.
template <class M, class T>
struct Cloud {
  const T* p;
  const T* sigma;
  const T* R;
  int64_t length;

  // Entry b of `batch`, where `args` has p, sigma, R, lengths and P.
  template <class Args>
  __device__ __forceinline__ Cloud(const Args& args, const Batch& batch, int64_t b)
      : p(At(args.p, batch, b)),
        sigma(M::kR > 0 ? At(args.sigma, batch, b) : nullptr),
        R(M::kR > 0 ? At(args.R, batch, b) : nullptr),
        length(LengthOf(args.lengths, batch, b, args.P)) {}

  __device__ __forceinline__ Vec3<T> Point(int64_t j) const { return Load3(p + 3 * j); }
  __device__ __forceinline__ typename M::Parameters Parameters(int64_t j) const {
    return M::Load(sigma == nullptr ? nullptr : sigma + 3 * j, R == nullptr ? nullptr : R + 9 * j);
  }
  __device__ __forceinline__ T Distance(Vec3<T> query, int64_t j) const {
    return M::Distance(Parameters(j), query - Point(j));
  }
};

// Whether all numbers are finite; other points have no finite distance, and none of −inf unless sigma has a negative.
template <class M, class T>
__device__ __forceinline__ bool IsFinite(Vec3<T> p, const typename M::Parameters& m) {
  bool finite = isfinite(p.x) && isfinite(p.y) && isfinite(p.z);
  if constexpr (M::kR > 0) {
    const T* numbers = reinterpret_cast<const T*>(&m);
#pragma unroll
    for (int e = 0; e < M::kSigma + M::kR; ++e) finite = finite && isfinite(numbers[e]);
  }
  return finite;
}

template <class M>
__device__ __forceinline__ bool HasNegative(const typename M::Parameters& m) {
  if constexpr (M::kR > 0) return m.sigma.x < 0 || m.sigma.y < 0 || m.sigma.z < 0;
  return false;
}

// Not less than the metric's Magnitude, unless that is beyond the largest float.
template <class M>
__device__ __forceinline__ float MagnitudeOf(const typename M::Parameters& m) {
  return __double2float_ru(fmin(M::Magnitude(m), double(FLT_MAX)));
}

// Unsigned integers in the order of the numbers. 0 is below all of them.
__device__ __forceinline__ unsigned ToKey(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float FromKey(unsigned key) {
  return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

// The least and the largest coordinates of points, and the largest magnitude. Kept as maxima of keys, of the least
// coordinates as those of their negatives: zeros cover nothing.
struct Extent {
  unsigned key[7];

  __device__ __forceinline__ void Cover(const Extent& other) {
#pragma unroll
    for (int e = 0; e < 7; ++e) key[e] = max(key[e], other.key[e]);
  }
  __device__ __forceinline__ void Cover(Vec3<float> low, Vec3<float> high, float magnitude) {
    Cover({ToKey(high.x), ToKey(high.y), ToKey(high.z), ToKey(-low.x), ToKey(-low.y), ToKey(-low.z), ToKey(magnitude)});
  }
  // The lanes' together, for all lanes.
  __device__ __forceinline__ void CoverWarp() {
#pragma unroll
    for (int e = 0; e < 7; ++e) {
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) key[e] = max(key[e], __shfl_xor_sync(kFullMask, key[e], step));
    }
  }

  __device__ __forceinline__ Vec3<float> High() const { return {FromKey(key[0]), FromKey(key[1]), FromKey(key[2])}; }
  __device__ __forceinline__ Vec3<float> Low() const { return {-FromKey(key[3]), -FromKey(key[4]), -FromKey(key[5])}; }
  __device__ __forceinline__ float Magnitude() const { return FromKey(key[6]); }
};

constexpr int kExtentThreads = 2 * kWarp;  // of a block; many small ones keep more multiprocessors busy
constexpr int kParts = kExtentThreads;     // in which a cloud's extent is found
static_assert(kParts * sizeof(Extent) == kExtentsBytes);

// extents [clouds, kParts], each of some of the finite points of a cloud. Launched with clouds · kParts blocks.
template <class M, class T, class Args>
__global__ void __launch_bounds__(kExtentThreads) FindExtents(const Args args, const Batch clouds, Extent* extents) {
  __shared__ Extent of_warp;
  const Cloud<M, T> cloud(args, clouds, blockIdx.x / kParts);
  Extent extent = {};
  for (int64_t j = blockIdx.x % kParts * kExtentThreads + threadIdx.x; j < cloud.length; j += kParts * kExtentThreads) {
    const Vec3<T> p = cloud.Point(j);
    const auto m = cloud.Parameters(j);
    if (!IsFinite<M>(p, m)) continue;
    const Vec3<float> at = {static_cast<float>(p.x), static_cast<float>(p.y), static_cast<float>(p.z)};
    extent.Cover(at, at, MagnitudeOf<M>(m));
  }
  extent.CoverWarp();
  if (threadIdx.x == kWarp) of_warp = extent;
  __syncthreads();
  extent.Cover(of_warp);
  if (threadIdx.x == 0) extents[blockIdx.x] = extent;
}

// The parts together, for all lanes of a warp.
__device__ __forceinline__ Extent Together(const Extent* parts) {
  const int lane = threadIdx.x % kWarp;
  Extent extent = parts[lane];
  static_assert(kParts == 2 * kWarp);
  extent.Cover(parts[kWarp + lane]);
  extent.CoverWarp();
  return extent;
}

// Where `p` is on a Hilbert curve through the extent's box, 3 · kCurveBits bits; outside it, where its nearest point
// is. What is near on the curve is near in space, and the other way round most of the time. The steps are J. Skilling's
// (Programming the Hilbert curve, AIP Conf. Proc. 707, 2004).
constexpr int kCurveBits = 16;
__device__ __forceinline__ uint64_t PlaceOnCurve(Vec3<float> p, Vec3<float> low, Vec3<float> high) {
  const auto cell = [](float x, float low, float high) {
    constexpr float kCells = 1 << kCurveBits;
    const float at = (x - low) / (high - low) * kCells;  // NaN in an empty box
    return static_cast<unsigned>(fminf(fmaxf(at, 0.0f), kCells - 1));
  };
  unsigned x = cell(p.x, low.x, high.x), y = cell(p.y, low.y, high.y), z = cell(p.z, low.z, high.z);
  const auto exchange = [&x](unsigned& other, unsigned bit) {
    const unsigned below = bit - 1, swap = (other & bit) != 0 ? 0 : (x ^ other) & below;
    x ^= (other & bit) != 0 ? below : swap;
    other ^= swap;
  };
#pragma unroll
  for (unsigned bit = 1u << (kCurveBits - 1); bit > 1; bit /= 2) {
    if ((x & bit) != 0) x ^= bit - 1;
    exchange(y, bit);
    exchange(z, bit);
  }
  y ^= x;
  z ^= y;
  unsigned flips = 0;
#pragma unroll
  for (unsigned bit = 1u << (kCurveBits - 1); bit > 1; bit /= 2) flips ^= (z & bit) != 0 ? bit - 1 : 0;
  x ^= flips, y ^= flips, z ^= flips;
  uint64_t place = 0;
#pragma unroll
  for (int bit = kCurveBits - 1; bit >= 0; --bit) {
    place = place << 3 | (x >> bit & 1) << 2 | (y >> bit & 1) << 1 | (z >> bit & 1);
  }
  return place;
}

}  // namespace knn::KNN_ISA

#endif  // JKA_KNN_INDEX_CLOUD_CUH_
