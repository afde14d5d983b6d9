// The distortion loss on CUDA: one warp a ray.
//
// A tile of the ray is in registers, read once with vector loads: lane l holds samples 4l … 4l + 3 of each chunk of
// 128. The sums of formulas.h are running sums over it, once from each end, by shuffles. A ray of one tile, which a
// warp picks by the ray's length, is read once and its gradients are written once. For longer rays, a sweep from the
// right first leaves its parts of the gradients in the results; each lane later adds to what it wrote itself.

#include <type_traits>

#include "common/cuda.cuh"
#include "distortion/cuda.h"
#include "distortion/formulas.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kWarps = 4;  // of a block; they have nothing in common
constexpr int kEach = 4;   // neighbouring samples of a lane
constexpr int kChunk = kWarp * kEach;

// Which gradients are wanted. The loss, if none are; with tangents also beside gradients.
enum class Gradients { kNone, kWeights, kAll };

template <class T>
__device__ __forceinline__ T Shuffle(T x, int lane) {
  return __shfl_sync(kFullMask, x, lane);
}
template <class T>
__device__ __forceinline__ Dual<T> Shuffle(Dual<T> x, int lane) {
  return {Shuffle(x.value, lane), Shuffle(x.tangent, lane)};
}

// A sweep over tiles from one end of the ray. Ranks count lanes, chunks and a lane's samples in its direction.
template <bool kForward, class N>
class Sweep {
 public:
  // mass, moment: the sums over all samples passed before each of the tile's.
  template <int kChunks>
  __device__ __forceinline__ void Next(const N (&w)[kChunks][kEach], const N (&m)[kChunks][kEach],
                                       N (&mass)[kChunks][kEach], N (&moment)[kChunks][kEach]) {
    constexpr int kLast = Place(kEach - 1, kEach);
    mass_ = RunningSums<false>(w, mass, mass_);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int c = Place(k, kChunks);
      // The sample before a lane's first is in the lane before, or in the last lane of the chunk before.
      const N of_last = k == 0 ? m_ : m[Place(k == 0 ? 0 : k - 1, kChunks)][kLast];
      N before = Shuffle(Rank() == kWarp - 1 ? of_last : m[c][kLast], LaneBefore(1));
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int i = Place(e, kEach);
        moment[c][i] = (kForward ? m[c][i] - before : before - m[c][i]) * mass[c][i];
        before = m[c][i];
      }
    }
    moment_ = RunningSums<true>(moment, moment, moment_);
    m_ = Shuffle(m[Place(kChunks - 1, kChunks)][kLast], Place(kWarp - 1, kWarp));
  }

 private:
  static __device__ __forceinline__ constexpr int Place(int rank, int n) { return kForward ? rank : n - 1 - rank; }
  static __device__ __forceinline__ int Rank() { return Place(threadIdx.x % kWarp, kWarp); }
  // The lane `step` before this one, cyclically.
  static __device__ __forceinline__ int LaneBefore(int step) {
    return (threadIdx.x + (kForward ? kWarp - step : step)) % kWarp;
  }

  // Replaces each sample's x by the sum of `carry` and all x before it, its own included or not. Returns the sum of
  // all.
  template <bool kInclusive, int kChunks>
  static __device__ __forceinline__ N RunningSums(const N (&x)[kChunks][kEach], N (&sum)[kChunks][kEach], N carry) {
    N upto[kChunks];  // sums of lanes, then of lanes up to this one
#pragma unroll
    for (int c = 0; c < kChunks; ++c) upto[c] = (x[c][0] + x[c][1]) + (x[c][2] + x[c][3]);
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {  // independent, so that one waits while the others go on
        const N more = Shuffle(upto[c], LaneBefore(step));
        if (Rank() >= step) upto[c] = upto[c] + more;
      }
    }
    N chunks = {};  // the sum of all chunks before; large sums are added to last, so that they are rounded seldom
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int c = Place(k, kChunks);
      const N lanes = Shuffle(upto[c], LaneBefore(1));
      const N before = carry + (Rank() == 0 ? chunks : chunks + lanes);
      chunks = chunks + Shuffle(upto[c], Place(kWarp - 1, kWarp));
      N own = {};
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int i = Place(e, kEach);
        const N with = e == 0 ? x[c][i] : own + x[c][i];
        sum[c][i] = kInclusive ? before + with : e == 0 ? before : before + own;
        own = with;
      }
    }
    return carry + chunks;
  }

  // Of what was passed. The first gap is that to 0, and meets no mass.
  N m_ = {}, mass_ = {}, moment_ = {};
};

// A lane's samples [at, at + kEach) of an array, those of them that are in [begin, end). Everything that does not
// change from sample to sample is the same for the whole warp.
template <class T>
struct alignas(16) Packet {
  T x[16 / sizeof(T)];
};

template <class T>
__device__ __forceinline__ bool IsPacked(const T* a, int at, int begin, int end) {
  return at >= begin && at + kEach <= end && reinterpret_cast<uintptr_t>(a + at) % sizeof(Packet<T>) == 0;
}

// Zeros outside. Zero weights there change none of the sums that are used.
template <class T>
__device__ __forceinline__ void LoadSamples(const T* a, int at, int begin, int end, T (&x)[kEach]) {
  constexpr int kPacket = 16 / sizeof(T);
  if (IsPacked(a, at, begin, end)) {
#pragma unroll
    for (int p = 0; p < kEach; p += kPacket) {
      const Packet<T> packet = *reinterpret_cast<const Packet<T>*>(a + at + p);
#pragma unroll
      for (int e = 0; e < kPacket; ++e) x[p + e] = packet.x[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < kEach; ++e) x[e] = at + e >= begin && at + e < end ? a[at + e] : T(0);
  }
}

template <class T>
__device__ __forceinline__ void StoreSamples(const T (&x)[kEach], T* a, int at, int begin, int end) {
  constexpr int kPacket = 16 / sizeof(T);
  if (IsPacked(a, at, begin, end)) {
#pragma unroll
    for (int p = 0; p < kEach; p += kPacket) {
      Packet<T> packet;
#pragma unroll
      for (int e = 0; e < kPacket; ++e) packet.x[e] = x[p + e];
      *reinterpret_cast<Packet<T>*>(a + at + p) = packet;
    }
  } else {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (at + e >= begin && at + e < end) a[at + e] = x[e];
    }
  }
}

// One ray: its arrays from its first sample on.
template <class T>
struct Ray {
  int64_t length;
  const T *w, *m, *interval, *v_w, *v_m, *v_interval;
  T *w_bar, *m_bar, *interval_bar;  // null where not wanted
  bool shared_interval;
  T ct;
};

template <class T, bool kTangents, Gradients kGradients, int kChunks>
struct Tiles {
  using N = std::conditional_t<kTangents, Dual<T>, T>;
  static constexpr int kTile = kChunks * kChunk;

  static __device__ __forceinline__ N Make(T value, T tangent) {
    if constexpr (kTangents) {
      return {value, tangent};
    } else {
      return value;
    }
  }

  static __device__ __forceinline__ void LoadChunk(const T* a, const T* v, int64_t tile, int at, int begin, int end,
                                                   N (&x)[kEach]) {
    T value[kEach], tangent[kEach] = {};
    LoadSamples(a + tile, at, begin, end, value);
    if (kTangents && v != nullptr) LoadSamples(v + tile, at, begin, end, tangent);
#pragma unroll
    for (int e = 0; e < kEach; ++e) x[e] = Make(value[e], tangent[e]);
  }

  // Adds half the ray's loss, or its tangent, to `loss`, and its interval's gradient to `interval_sum`: this lane's
  // share. Tiles begin `shift` samples before the ray, so that packets are aligned.
  static __device__ __forceinline__ void Run(const Ray<T>& ray, int shift, T& loss, T& interval_sum) {
    const int lane = threadIdx.x % kWarp;
    const int64_t tiles = (ray.length + shift + kTile - 1) / kTile;
    const T factor = 2 * ray.ct;
    constexpr bool kWeights = kGradients != Gradients::kNone, kAll = kGradients == Gradients::kAll;
    constexpr bool kLoss = kTangents || !kWeights;

    N w[kChunks][kEach], m[kChunks][kEach], mass[kChunks][kEach], moment[kChunks][kEach];
    int64_t tile = 0;  // the index of the tile's first sample; that of the first tile may be negative
    int begin = 0, end = 0;
    const auto load = [&](int64_t t) {
      tile = t * kTile - shift;
      begin = t == 0 ? shift : 0;
      end = static_cast<int>(min(ray.length - tile, int64_t{kTile}));
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        LoadChunk(ray.w, ray.v_w, tile, c * kChunk + lane * kEach, begin, end, w[c]);
        LoadChunk(ray.m, ray.v_m, tile, c * kChunk + lane * kEach, begin, end, m[c]);
      }
    };
    // Parts of the gradients that the sweep from the right gives.
    T w_bar[kChunks][kEach], m_bar[kChunks][kEach];
    Sweep<false, N> from_right;
    const auto sweep_from_right = [&] {
      from_right.Next(w, m, mass, moment);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const Side<N> right = {mass[c][e], moment[c][e]};
          if constexpr (kWeights) w_bar[c][e] = Result(HalfWeightBarFromRight(right));
          if constexpr (kAll) m_bar[c][e] = Result(HalfPositionBarFromRight(w[c][e], right));
        }
      }
    };

    if constexpr (kWeights) {
      for (int64_t t = tiles - 1; t > 0; --t) {
        load(t);
        sweep_from_right();
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int at = c * kChunk + lane * kEach;
          if (ray.w_bar != nullptr) StoreSamples(w_bar[c], ray.w_bar + tile, at, begin, end);
          if constexpr (kAll) {
            if (ray.m_bar != nullptr) StoreSamples(m_bar[c], ray.m_bar + tile, at, begin, end);
          }
        }
      }
    }

    const N shared =
        ray.shared_interval ? Make(*ray.interval, ray.v_interval == nullptr ? T(0) : *ray.v_interval) : N{};
    Sweep<true, N> from_left;
    for (int64_t t = 0; t < tiles; ++t) {
      load(t);
      if constexpr (kWeights) {
        if (t == 0) {
          sweep_from_right();
        } else {
#pragma unroll
          for (int c = 0; c < kChunks; ++c) {
            const int at = c * kChunk + lane * kEach;
            if (ray.w_bar != nullptr) LoadSamples(ray.w_bar + tile, at, begin, end, w_bar[c]);
            if constexpr (kAll) {
              if (ray.m_bar != nullptr) LoadSamples(ray.m_bar + tile, at, begin, end, m_bar[c]);
            }
          }
        }
      }
      from_left.Next(w, m, mass, moment);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int at = c * kChunk + lane * kEach;
        N interval[kEach] = {shared, shared, shared, shared};
        if (!ray.shared_interval) LoadChunk(ray.interval, ray.v_interval, tile, at, begin, end, interval);
        T interval_bar[kEach];
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const Side<N> left = {mass[c][e], moment[c][e]};
          if constexpr (kLoss) loss += Result(HalfLoss(w[c][e], interval[e], left));
          if constexpr (kWeights) {
            w_bar[c][e] = factor * (w_bar[c][e] + Result(HalfWeightBar(w[c][e], interval[e], left)));
          }
          if constexpr (kAll) {
            m_bar[c][e] = factor * (m_bar[c][e] + Result(HalfPositionBar(w[c][e], left)));
            interval_bar[e] = factor * Result(HalfIntervalBar(w[c][e]));
            interval_sum += interval_bar[e];
          }
        }
        if constexpr (kWeights) {
          if (ray.w_bar != nullptr) StoreSamples(w_bar[c], ray.w_bar + tile, at, begin, end);
        }
        if constexpr (kAll) {
          if (ray.m_bar != nullptr) StoreSamples(m_bar[c], ray.m_bar + tile, at, begin, end);
          if (ray.interval_bar != nullptr) StoreSamples(interval_bar, ray.interval_bar + tile, at, begin, end);
        }
      }
    }
  }
};

// Registers bound how large a tile can be.
template <class N>
constexpr int kMaxChunks = 16 / sizeof(N);

// Blocks that are to fit on a multiprocessor: as many as do without spilling. More loads are then under way.
template <class T, Gradients kGradients>
constexpr int kMinBlocks = sizeof(T) == 4 && kGradients != Gradients::kAll ? 4 : 3;

template <class T, bool kTangents, Gradients kGradients>
__global__ void __launch_bounds__(kWarps* kWarp, (kMinBlocks<T, kGradients>))
    RayKernel(const Distortion<T> args, int64_t rows) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarp;
  int64_t b = row, r = 0, begin = 0, end = args.N;
  if (args.offsets.data != nullptr) {
    const int64_t rays = Rows(args);
    b = row / rays;
    r = row - b * rays;
    const int32_t* offsets = At(args.offsets, args.batch, b);
    if constexpr (kGradients != Gradients::kNone) {
      // Samples outside all rays, which may be many where arrays are padded, are shared out among the entry's warps.
      const int64_t before = offsets[0], behind = offsets[args.R], outside = before + args.N - behind;
      for (int64_t i = r * kWarp + lane; i < outside; i += rays * kWarp) {
        const int64_t at = b * args.N + (i < before ? i : i - before + behind);
        if (args.w_bar != nullptr) args.w_bar[at] = 0;
        if (args.m_bar != nullptr) args.m_bar[at] = 0;
        if (args.interval_bar != nullptr && !args.shared_interval) args.interval_bar[at] = 0;
      }
    }
    if (args.R == 0) return;
    begin = offsets[r];
    end = offsets[r + 1];
  }

  const auto operand = [&](const Operand<const T>& a, int64_t first) {
    return a.data == nullptr ? nullptr : At(a, args.batch, b) + first;
  };
  const auto result = [&](T* a) { return a == nullptr ? nullptr : a + b * args.N + begin; };
  Ray<T> ray;
  ray.length = end - begin;
  ray.w = operand(args.w, begin);
  ray.m = operand(args.m, begin);
  ray.interval = operand(args.interval, args.shared_interval ? 0 : begin);
  ray.v_w = operand(args.v_w, begin);
  ray.v_m = operand(args.v_m, begin);
  ray.v_interval = operand(args.v_interval, args.shared_interval ? 0 : begin);
  ray.w_bar = result(args.w_bar);
  ray.m_bar = result(args.m_bar);
  ray.interval_bar = args.shared_interval ? nullptr : result(args.interval_bar);
  ray.shared_interval = args.shared_interval;
  ray.ct = args.ct.data == nullptr ? T(0) : operand(args.ct, 0)[r];

  using N = std::conditional_t<kTangents, Dual<T>, T>;
  const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(ray.w) / sizeof(T) % (16 / sizeof(T)));
  const int64_t span = ray.length + shift;
  T loss = 0, interval_sum = 0;
  if (kMaxChunks<N> == 1 || span <= kChunk) {
    Tiles<T, kTangents, kGradients, 1>::Run(ray, shift, loss, interval_sum);
  } else if (kMaxChunks<N> == 2 || span <= 2 * kChunk) {
    Tiles<T, kTangents, kGradients, 2>::Run(ray, shift, loss, interval_sum);
  } else {
    Tiles<T, kTangents, kGradients, 4>::Run(ray, shift, loss, interval_sum);
  }

  const int64_t at = b * args.R + r;
  if (args.loss != nullptr) {
    loss = 2 * WarpSum(loss);
    if (lane == 0) args.loss[at] = loss;
  }
  if (args.interval_bar != nullptr && args.shared_interval) {
    interval_sum = WarpSum(interval_sum);
    if (lane == 0) args.interval_bar[at] = interval_sum;
  }
}

template <class T, bool kTangents, Gradients kGradients>
cudaError_t Launch(const Distortion<T>& args, cudaStream_t stream) {
  const int64_t rows = Count(args.batch) * Rows(args), blocks = CeilDiv(rows, kWarps);
  if (blocks == 0) return cudaSuccess;
  if (cudaError_t error = CheckGrid(blocks); error != cudaSuccess) return error;
  RayKernel<T, kTangents, kGradients><<<static_cast<unsigned>(blocks), kWarps * kWarp, 0, stream>>>(args, rows);
  return cudaGetLastError();
}

// Neighbouring threads look for neighbouring rays, and so read the same ids until their ways part.
__global__ void OffsetKernel(const RayOffsets args, int64_t total) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= total) return;
  const int64_t b = i / (args.R + 1), r = i - b * (args.R + 1);
  const int32_t* ray_id = At(args.ray_id, args.batch, b);
  args.offsets[i] = static_cast<int32_t>(LowerBound(ray_id, args.N, static_cast<int32_t>(r)));
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

template <class T>
cudaError_t LaunchDistortion(const Distortion<T>& args, cudaStream_t stream) {
  using namespace KNN_ISA;
  const bool gradients = WantsGradients(args);
  if (HasTangents(args)) {
    return gradients ? Launch<T, true, Gradients::kAll>(args, stream) : Launch<T, true, Gradients::kNone>(args, stream);
  }
  if (args.m_bar != nullptr || args.interval_bar != nullptr) return Launch<T, false, Gradients::kAll>(args, stream);
  return gradients ? Launch<T, false, Gradients::kWeights>(args, stream)
                   : Launch<T, false, Gradients::kNone>(args, stream);
}

template cudaError_t LaunchDistortion(const Distortion<float>&, cudaStream_t);
template cudaError_t LaunchDistortion(const Distortion<double>&, cudaStream_t);

cudaError_t LaunchRayOffsets(const RayOffsets& args, cudaStream_t stream) {
  using namespace KNN_ISA;
  constexpr int kThreads = 128;
  const int64_t total = Count(args.batch) * (args.R + 1), blocks = CeilDiv(total, kThreads);
  if (blocks == 0) return cudaSuccess;
  if (cudaError_t error = CheckGrid(blocks); error != cudaSuccess) return error;
  OffsetKernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args, total);
  return cudaGetLastError();
}

}  // namespace knn
