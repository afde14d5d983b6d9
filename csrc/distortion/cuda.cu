// The distortion loss on CUDA: one warp a ray.
//
// A warp copies a ray's samples to shared memory, and the next ray's while it computes with this one. Of a ray in
// shared memory each lane has a run of neighbouring samples, an odd number of them, so that lanes meet different banks.
// Every lane sums its run, shuffles join the runs, and from what lies before its run each lane then gives every sample
// the sums of formulas.h, once from either end. Gradients take the place of what they are gradients in, and are copied
// out. A ray longer than a tile goes through in tiles, twice: a sweep from the right first leaves its parts of the
// gradients in the results, where each lane later finds what it wrote itself.

#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <type_traits>

#include "common/cuda.cuh"
#include "distortion/cuda.h"
#include "distortion/formulas.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kWarps = 2;             // of a block; they have nothing in common
constexpr int kMaxTile = 1024;        // samples
constexpr int kWarpBytes = 24 << 10;  // of shared memory, at most; a block then has what it may without asking
constexpr int kMaxRays = 8;           // of a warp, one after another
constexpr int kFewRays = 4096;        // so few are worth a warp each

// Which gradients are wanted. The loss, if none are; with tangents also beside gradients.
enum class Gradients { kNone, kWeights, kAll };

// A sum with what its rounding lost. Gradients in m are differences of masses, of which little may be left.
template <class N>
struct Twofold {
  N high, low;
  __device__ __forceinline__ Twofold(N high = {}, N low = {}) : high(high), low(low) {}
};
template <class N>
__device__ __forceinline__ Twofold<N> operator+(const Twofold<N>& a, const Twofold<N>& b) {
  const N sum = a.high + b.high, of_b = sum - a.high;  // Knuth's TwoSum
  return {sum, a.low + b.low + ((a.high - (sum - of_b)) + (b.high - of_b))};
}
template <class N>
__device__ __forceinline__ N Rounded(const N& sum) {
  return sum;
}
template <class N>
__device__ __forceinline__ N Rounded(const Twofold<N>& sum) {
  return sum.high;
}
template <class N>
__device__ __forceinline__ N Plus(const N& sum, const N& x) {
  return sum + x;
}
template <class N>
__device__ __forceinline__ N Plus(const Twofold<N>& sum, const N& x) {
  return sum.high + (sum.low + x);
}

// Sums over neighbouring samples, in the order of x, which is m in a sweep from the left and −m in one from the right.
template <class N, class Mass>
struct Run {
  Mass mass;
  N moment;  // about x
  N x;       // of the last sample
};

// Of a run and the one that follows it.
template <class N, class Mass>
__device__ __forceinline__ Run<N, Mass> Join(const Run<N, Mass>& a, const Run<N, Mass>& b) {
  return {a.mass + b.mass, Rounded(a.mass) * (b.x - a.x) + a.moment + b.moment, b.x};
}

template <class T>
__device__ __forceinline__ T Shuffle(T x, int lane) {
  return __shfl_sync(kFullMask, x, lane);
}
template <class T>
__device__ __forceinline__ Dual<T> Shuffle(const Dual<T>& x, int lane) {
  return {Shuffle(x.value, lane), Shuffle(x.tangent, lane)};
}
template <class N>
__device__ __forceinline__ Twofold<N> Shuffle(const Twofold<N>& x, int lane) {
  return {Shuffle(x.high, lane), Shuffle(x.low, lane)};
}
template <class N, class Mass>
__device__ __forceinline__ Run<N, Mass> Shuffle(const Run<N, Mass>& run, int lane) {
  return {Shuffle(run.mass, lane), Shuffle(run.moment, lane), Shuffle(run.x, lane)};
}

// What comes before this lane's run: `carry` and the runs of the lanes before. All runs join the carry.
template <bool kForward, class Run>
__device__ __forceinline__ Run Before(Run run, Run& carry) {
  const int lane = threadIdx.x % kWarp, rank = kForward ? lane : kWarp - 1 - lane;
  const auto lane_before = [&](int step) { return (kForward ? lane - step : lane + step) & (kWarp - 1); };
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const Run other = Shuffle(run, lane_before(step));
    if (rank >= step) run = Join(other, run);
  }
  const Run lanes = Shuffle(run, lane_before(1)), all = Shuffle(run, kForward ? kWarp - 1 : 0);
  const Run before = rank == 0 ? carry : Join(carry, lanes);
  carry = Join(carry, all);
  return before;
}

struct Ray {
  int64_t b, r;  // batch entry, and which of its rays
  int64_t begin, length;
};

template <class T, bool kTangents, Gradients kGradients>
class Warp {
 public:
  using N = std::conditional_t<kTangents, Dual<T>, T>;
  static constexpr bool kWeights = kGradients != Gradients::kNone, kAll = kGradients == Gradients::kAll;
  using Sums = Run<N, std::conditional_t<kAll, Twofold<N>, N>>;
  static constexpr int kParts = kAll ? 2 : kWeights ? 1 : 0;  // that wait for the sweep from the left

  // Elements of shared memory for a sample.
  static __host__ __device__ int Width(const Distortion<T>& args) { return 2 * Operands(args) + kParts; }

  __device__ Warp(const Distortion<T>& args, int tile, T* memory)
      : args_(args), tile_(tile), part_w_(memory), part_m_(memory + tile), stages_(memory + kParts * tile) {}

  // Starts copying a ray, if it fits into a tile. Each is followed by that of the next ray, then computed with.
  __device__ __forceinline__ void Prefetch(const Ray& ray, int stage) {
    if (ray.length <= tile_) Fetch(ray, 0, static_cast<int>(ray.length), Slots(stage));
    __pipeline_commit();
  }

  __device__ __forceinline__ void Compute(const Ray& ray, int stage) {
    const Samples samples = Slots(stage);
    const T factor = kWeights ? 2 * At(args_.ct, args_.batch, ray.b)[ray.r] : T(0);
    const int64_t from = ray.b * args_.N + ray.begin, tiles = CeilDiv(ray.length, tile_);
    const auto result = [from](T* a) { return a == nullptr ? nullptr : a + from; };
    T *const w_bar = result(args_.w_bar), *const m_bar = result(args_.m_bar);
    T* const interval_bar = args_.shared_interval ? nullptr : result(args_.interval_bar);
    const N shared_interval = args_.shared_interval ? Make(At(args_.interval, args_.batch, ray.b),
                                                           AtOrNull(args_.v_interval, args_.batch, ray.b), 0)
                                                    : N{};
    __pipeline_wait_prior(1);
    __syncwarp();
    const auto load = [&](int64_t at) {
      const int count = static_cast<int>(min(ray.length - at, int64_t{tile_}));
      if (tiles > 1) {
        Fetch(ray, at, count, samples);
        __pipeline_commit();
        __pipeline_wait_prior(0);
        __syncwarp();
      }
      return count;
    };

    Sums left = {}, right = {};
    if constexpr (kWeights) {
      for (int64_t at = (tiles - 1) * tile_; at > 0; at -= tile_) {
        SweepFromRight(samples, load(at), right, w_bar == nullptr ? nullptr : w_bar + at,
                       m_bar == nullptr ? nullptr : m_bar + at);
        __syncwarp();
      }
    }
    T loss = 0, interval_sum = 0;
    for (int64_t at = 0; at < ray.length; at += tile_) {
      const int count = load(at);
      if constexpr (kWeights) {
        if (at == 0) SweepFromRight(samples, count, right, part_w_, part_m_);
      }
      const T *const part_w = at == 0 ? part_w_ : w_bar + at, *const part_m = at == 0 ? part_m_ : m_bar + at;
      Sweep<true>(samples, count, left, [&](int i, N w, const Side<N>& side) {
        const N interval = args_.shared_interval ? shared_interval : Make(samples.interval, samples.v_interval, i);
        if constexpr (kTangents || !kWeights) loss += Result(HalfLoss(w, interval, side));
        if constexpr (kWeights) {
          if (w_bar != nullptr) samples.w[i] = factor * (part_w[i] + Result(HalfWeightBar(w, interval, side)));
        }
        if constexpr (kAll) {
          if (m_bar != nullptr) samples.m[i] = factor * (part_m[i] + Result(HalfPositionBar(w, side)));
          const T bar = factor * Result(HalfIntervalBar(w));
          if (interval_bar != nullptr) samples.interval[i] = bar;
          interval_sum += bar;
        }
      });
      __syncwarp();
      if constexpr (kWeights) Store(samples.w, w_bar, at, count);
      if constexpr (kAll) {
        Store(samples.m, m_bar, at, count);
        Store(samples.interval, interval_bar, at, count);
      }
      __syncwarp();  // before the next samples take their place
    }

    const int64_t at = ray.b * args_.R + ray.r;
    if (args_.loss != nullptr) {
      loss = 2 * WarpSum(loss);
      if (threadIdx.x % kWarp == 0) args_.loss[at] = loss;
    }
    if (args_.interval_bar != nullptr && args_.shared_interval) {
      interval_sum = WarpSum(interval_sum);
      if (threadIdx.x % kWarp == 0) args_.interval_bar[at] = interval_sum;
    }
  }

 private:
  // A tile of each operand, null for those that are not given or shared.
  struct Samples {
    T *w, *m, *interval, *v_w, *v_m, *v_interval;
  };

  static __host__ __device__ int Operands(const Distortion<T>& args) {
    const auto given = [](const Operand<const T>& a) { return a.data != nullptr ? 1 : 0; };
    return 2 + given(args.v_w) + given(args.v_m) + (args.shared_interval ? 0 : 1 + given(args.v_interval));
  }

  __device__ __forceinline__ Samples Slots(int stage) const {
    T* at = stages_ + stage * Operands(args_) * tile_;
    const auto slot = [&](bool given) {
      T* const here = given ? at : nullptr;
      at += given ? tile_ : 0;
      return here;
    };
    Samples samples = {};
    samples.w = slot(true);
    samples.m = slot(true);
    samples.interval = slot(!args_.shared_interval);
    if constexpr (kTangents) {
      samples.v_w = slot(args_.v_w.data != nullptr);
      samples.v_m = slot(args_.v_m.data != nullptr);
      samples.v_interval = slot(!args_.shared_interval && args_.v_interval.data != nullptr);
    }
    return samples;
  }

  __device__ __forceinline__ void Fetch(const Ray& ray, int64_t at, int count, const Samples& to) const {
    const auto copy = [&](const Operand<const T>& a, T* slot) {
      if (slot == nullptr) return;
      const T* const from = At(a, args_.batch, ray.b) + ray.begin + at;
#pragma unroll 4
      for (int i = threadIdx.x % kWarp; i < count; i += kWarp) __pipeline_memcpy_async(slot + i, from + i, sizeof(T));
    };
    copy(args_.w, to.w);
    copy(args_.m, to.m);
    copy(args_.interval, to.interval);
    if constexpr (kTangents) {
      copy(args_.v_w, to.v_w);
      copy(args_.v_m, to.v_m);
      copy(args_.v_interval, to.v_interval);
    }
  }

  static __device__ __forceinline__ void Store(const T* slot, T* to, int64_t at, int count) {
    if (to == nullptr) return;
    for (int i = threadIdx.x % kWarp; i < count; i += kWarp) to[at + i] = slot[i];
  }

  static __device__ __forceinline__ N Make(const T* value, const T* tangent, int i) {
    if constexpr (kTangents) {
      return {value[i], tangent == nullptr ? T(0) : tangent[i]};
    } else {
      return value[i];
    }
  }

  // Calls visit(i, w, side) for the samples of this lane, where side has the sums over all samples before in the
  // direction of the sweep. `carry` are the sums of the tiles before, and of this one too afterwards.
  template <bool kForward, class Visit>
  static __device__ __forceinline__ void Sweep(const Samples& samples, int count, Sums& carry, const Visit& visit) {
    const int each = CeilDiv(count, kWarp) | 1, lane = threadIdx.x % kWarp;
    const int begin = min(lane * each, count), end = min(begin + each, count);
    const auto x = [&](int i) { return Scale(kForward ? 1 : -1, Make(samples.m, samples.v_m, i)); };
    const auto weight = [&](int i) { return Make(samples.w, samples.v_w, i); };

    // Lanes behind the last sample have an empty run at it.
    N mass = {}, moment = {};
    const N at = x(kForward ? end - 1 : min(begin, count - 1));
#pragma unroll 4
    for (int i = begin; i < end; ++i) {
      const N w = weight(i);
      mass = mass + w;
      moment = moment + w * (at - x(i));
    }
    const Sums before = Before<kForward>(Sums{mass, moment, at}, carry);

    // Sums within the run are kept apart, so that large sums are rounded once a sample.
    N last = before.x;
    mass = moment = {};
#pragma unroll 4
    for (int k = 0; k < end - begin; ++k) {
      const int i = kForward ? begin + k : end - 1 - k;
      const N w = weight(i), here = x(i);
      moment = moment + mass * (here - last);
      const N jump = Rounded(before.mass) * (here - before.x);
      visit(i, w, Side<N>{Plus(before.mass, mass), before.moment + jump + moment});
      mass = mass + w;
      last = here;
    }
  }

  static __device__ __forceinline__ void SweepFromRight(const Samples& samples, int count, Sums& carry, T* part_w,
                                                        T* part_m) {
    Sweep<false>(samples, count, carry, [&](int i, N w, const Side<N>& side) {
      if (part_w != nullptr) part_w[i] = Result(HalfWeightBarFromRight(side));
      if constexpr (kAll) {
        if (part_m != nullptr) part_m[i] = Result(HalfPositionBarFromRight(w, side));
      }
    });
  }

  const Distortion<T>& args_;
  const int tile_;
  T *const part_w_, *const part_m_, *const stages_;
};

template <class T, bool kTangents, Gradients kGradients>
__global__ void __launch_bounds__(kWarps* kWarp)
    RayKernel(const Distortion<T> args, int64_t rows, int rays_per_warp, int tile) {
  extern __shared__ uint4 shared_memory[];
  using W = Warp<T, kTangents, kGradients>;
  const int lane = threadIdx.x % kWarp, index = threadIdx.x / kWarp;
  W warp(args, tile, reinterpret_cast<T*>(shared_memory) + index * W::Width(args) * tile);
  const int64_t first = int64_t{blockIdx.x} * kWarps * rays_per_warp + index;
  const int64_t behind = min(rows, first + int64_t{kWarps} * rays_per_warp);
  // No samples where there is no ray.
  const auto find = [&](int64_t row) -> Ray {
    if (row >= behind) return {};
    if (args.offsets.data == nullptr) return {row, 0, 0, args.N};
    const int64_t rays = Rows(args), b = rows == rays ? 0 : row / rays, r = row - b * rays;
    if (args.R == 0) return {b, 0, 0, 0};
    const int32_t* offsets = At(args.offsets, args.batch, b);
    const int64_t begin = offsets[r];
    return {b, r, begin, offsets[r + 1] - begin};
  };

  Ray ray = find(first), next = find(first + kWarps);
  warp.Prefetch(ray, 0);
  int stage = 0;
  for (int64_t row = first; row < behind; row += kWarps) {
    warp.Prefetch(next, 1 - stage);
    const Ray after = find(row + 2 * kWarps);
    if (args.offsets.data != nullptr && kGradients != Gradients::kNone) {
      // Samples outside all rays, which may be many where arrays are padded, are shared out among the entry's warps.
      const int32_t* offsets = At(args.offsets, args.batch, ray.b);
      const int64_t before = offsets[0], behind_all = offsets[args.R], outside = before + args.N - behind_all;
      for (int64_t i = ray.r * kWarp + lane; i < outside; i += Rows(args) * kWarp) {
        const int64_t at = ray.b * args.N + (i < before ? i : i - before + behind_all);
        if (args.w_bar != nullptr) args.w_bar[at] = 0;
        if (args.m_bar != nullptr) args.m_bar[at] = 0;
        if (args.interval_bar != nullptr && !args.shared_interval) args.interval_bar[at] = 0;
      }
    }
    if (args.R > 0) warp.Compute(ray, stage);
    ray = next;
    next = after;
    stage = 1 - stage;
  }
}

template <class T, bool kTangents, Gradients kGradients>
cudaError_t Launch(const Distortion<T>& args, cudaStream_t stream) {
  const auto kernel = RayKernel<T, kTangents, kGradients>;
  const int64_t rows = Count(args.batch) * Rows(args);
  const int rays_per_warp = static_cast<int>(std::clamp<int64_t>(rows / kFewRays, 1, kMaxRays));
  const int64_t blocks = CeilDiv(rows, kWarps * rays_per_warp);
  if (blocks == 0) return cudaSuccess;
  if (cudaError_t error = CheckGrid(blocks); error != cudaSuccess) return error;
  const int bytes = Warp<T, kTangents, kGradients>::Width(args) * sizeof(T);
  int tile = kMaxTile;
  while (tile * bytes > kWarpBytes) tile /= 2;
  tile = static_cast<int>(std::clamp<int64_t>(args.N, 1, tile));
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kWarps * kWarp, kWarps * tile * bytes, stream>>>(args, rows, rays_per_warp,
                                                                                           tile);
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
