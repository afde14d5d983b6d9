// The distortion loss on CUDA: one warp a ray.
//
// A ray goes through in tiles, of which each lane has a run of neighbouring samples in registers. It sums its run from
// either end, shuffles join the runs, and from what is on either side of its run each lane completes the sums of
// formulas.h for its samples. Gradients are put in order in shared memory, so that they are written in whole lines.
//
// Of a ray of several tiles, a sweep from the right sums all but the first, before any gradient is computed. What is to
// the right of a tile then waits where the tile's gradients will be.

#include <type_traits>

#include "common/cuda.cuh"
#include "distortion/cuda.h"
#include "distortion/formulas.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kWarps = 2;  // of a block; they have nothing in common

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
__device__ __forceinline__ Twofold<N> Negative(const Twofold<N>& x) {
  return {Scale(-1, x.high), Scale(-1, x.low)};
}
template <class N>
__device__ __forceinline__ N Negative(const N& x) {
  return Scale(-1, x);
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

// a·b + c
template <class T>
__device__ __forceinline__ T MultiplyAdd(T a, T b, T c) {
  return fma(a, b, c);
}
template <class T>
__device__ __forceinline__ Dual<T> MultiplyAdd(const Dual<T>& a, const Dual<T>& b, const Dual<T>& c) {
  return {fma(a.value, b.value, c.value), fma(a.value, b.tangent, fma(a.tangent, b.value, c.tangent))};
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

// Replaces each lane's `left` by the sum over this lane and those to its left, and, if that is wanted, `right`
// likewise: both at once, so that one waits while the other goes on.
template <bool kRight, class S>
__device__ __forceinline__ void RunningSums(S& left, S& right) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const S more_left = Shuffle(left, lane - step), more_right = kRight ? Shuffle(right, lane + step) : S{};
    if (lane >= step) left = more_left + left;
    if (kRight && lane + step < kWarp) right = more_right + right;
  }
}
// For floats, without the comparisons: a shuffle knows whether the lane it asks for exists.
template <bool kRight>
__device__ __forceinline__ void RunningSums(float& left, float& right) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    if constexpr (kRight) {
      asm volatile(
          "{ .reg .f32 l, r; .reg .pred in_l, in_r;"
          " shfl.sync.up.b32 l|in_l, %0, %2, 0, 0xffffffff; shfl.sync.down.b32 r|in_r, %1, %2, 31, 0xffffffff;"
          " @in_l add.f32 %0, l, %0; @in_r add.f32 %1, r, %1; }"
          : "+f"(left), "+f"(right)
          : "r"(step));
    } else {
      asm volatile(
          "{ .reg .f32 l; .reg .pred in_l;"
          " shfl.sync.up.b32 l|in_l, %0, %1, 0, 0xffffffff; @in_l add.f32 %0, l, %0; }"
          : "+f"(left)
          : "r"(step));
    }
  }
}
template <bool kRight>
__device__ __forceinline__ void RunningSums(Dual<float>& left, Dual<float>& right) {
  RunningSums<kRight>(left.value, right.value);
  RunningSums<kRight>(left.tangent, right.tangent);
}

// Sums over neighbouring samples, in the order of x, which is m in a sweep from the left and −m in one from the right.
template <class N, class Mass>
struct Run {
  Mass mass;
  N moment;  // about x
  N x;       // of the last sample
};

// Replaces this lane's run, as seen from the left and, if that is wanted, from the right, by what is beyond it on that
// side: the runs of the lanes there, and behind them the carry. If there are more tiles, all runs then join the
// carries.
template <bool kRight, class Run>
__device__ __forceinline__ void LookBeyond(Run& left, Run& right, Run& left_carry, Run& right_carry, bool more) {
  const int lane = threadIdx.x % kWarp, last = kWarp - 1;
  auto left_mass = left.mass, right_mass = right.mass;
  RunningSums<kRight>(left_mass, right_mass);
  Run on_left = {left_carry.mass + Shuffle(left_mass, lane - 1), {}, Shuffle(left.x, lane - 1)}, on_right = {};
  if (lane == 0) on_left = left_carry;
  if constexpr (kRight) {
    on_right = {right_carry.mass + Shuffle(right_mass, lane + 1), {}, Shuffle(right.x, lane + 1)};
    if (lane == last) on_right = right_carry;
  }
  // From run to run, the moment of all that is beyond grows by its mass times the way.
  auto left_moment = MultiplyAdd(Rounded(on_left.mass), left.x - on_left.x, left.moment);
  auto right_moment = MultiplyAdd(Rounded(on_right.mass), right.x - on_right.x, right.moment);
  RunningSums<kRight>(left_moment, right_moment);
  on_left.moment = left_carry.moment + Shuffle(left_moment, lane - 1);
  if (lane == 0) on_left.moment = left_carry.moment;
  if constexpr (kRight) {
    on_right.moment = right_carry.moment + Shuffle(right_moment, lane + 1);
    if (lane == last) on_right.moment = right_carry.moment;
  }
  if (more) {
    left_carry = {left_carry.mass + Shuffle(left_mass, last), left_carry.moment + Shuffle(left_moment, last),
                  Shuffle(left.x, last)};
    if constexpr (kRight) {
      right_carry = {right_carry.mass + Shuffle(right_mass, 0), right_carry.moment + Shuffle(right_moment, 0),
                     Shuffle(right.x, 0)};
    }
  }
  left = on_left;
  right = on_right;
}

template <class T>
struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// One ray: its arrays from its first sample on, null where not given or not wanted.
template <class T>
struct Ray {
  int length, shift;  // tiles begin `shift` samples before the ray, so that packets are aligned
  const T *w, *m, *interval, *v_w, *v_m, *v_interval;
  T *w_bar, *m_bar, *interval_bar;
  bool shared_interval;
  T ct;
};

template <class T, bool kTangents, Gradients kGradients, int kPackets>
struct Tiles {
  using N = std::conditional_t<kTangents, Dual<T>, T>;
  static constexpr bool kWeights = kGradients != Gradients::kNone, kAll = kGradients == Gradients::kAll;
  using Sums = Run<N, std::conditional_t<kAll, Twofold<N>, N>>;
  static constexpr int kPacket = Packet<T>::kSize;
  static constexpr int kEach = kPackets * kPacket;  // samples of a lane
  static constexpr int kTile = kWarp * kEach;

  // The tile that begins at `at` of the ray. Its samples [begin, end) are the ray's.
  struct Part {
    int at, begin, end;
    __device__ __forceinline__ Part(const Ray<T>& ray, int at)
        : at(at), begin(at < 0 ? ray.shift : 0), end(min(ray.length - at, kTile)) {}
  };

  static __device__ __forceinline__ int Lane() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ N Make(T value, T tangent) {
    if constexpr (kTangents) {
      return {value, tangent};
    } else {
      return value;
    }
  }
  static __device__ __forceinline__ bool IsPacked(const T* a) {
    return reinterpret_cast<uintptr_t>(a) % sizeof(Packet<T>) == 0;
  }

  // Of an array, samples [i, i + kPacket) of a tile; zeros outside the ray, whose weight changes no sum that is used.
  static __device__ __forceinline__ Packet<T> Load(const T* a, const Part& part, int i) {
    const T* const from = a + part.at + i;
    if (i >= part.begin && i + kPacket <= part.end && IsPacked(from)) return *reinterpret_cast<const Packet<T>*>(from);
    Packet<T> packet;
#pragma unroll
    for (int e = 0; e < kPacket; ++e) packet.x[e] = i + e >= part.begin && i + e < part.end ? from[e] : T(0);
    return packet;
  }

  // This lane's samples of an array and its tangents.
  static __device__ __forceinline__ void LoadAll(const T* values, const T* tangents, const Part& part, N (&x)[kEach]) {
    const int i = Lane() * kEach;
    Packet<T> value[kPackets], tangent[kPackets] = {};
    const auto load = [&](const T* a, Packet<T>(&packets)[kPackets]) {
      if (part.begin == 0 && part.end == kTile && IsPacked(a + part.at)) {
#pragma unroll
        for (int j = 0; j < kPackets; ++j) {
          packets[j] = *reinterpret_cast<const Packet<T>*>(a + part.at + i + j * kPacket);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kPackets; ++j) packets[j] = Load(a, part, i + j * kPacket);
      }
    };
    load(values, value);
    if (kTangents && tangents != nullptr) load(tangents, tangent);
#pragma unroll
    for (int e = 0; e < kEach; ++e) x[e] = Make(value[e / kPacket].x[e % kPacket], tangent[e / kPacket].x[e % kPacket]);
  }

  // Where packet p of a tile is in shared memory: neighbouring lanes meet different banks, whether they access
  // neighbouring packets or have kPackets neighbouring ones each.
  static __device__ __forceinline__ int Place(int p) { return p ^ (p / 8 & (kPackets - 1)); }

  // Writes a tile of a result.
  static __device__ __forceinline__ void Store(const Packet<T>* slot, T* result, const Part& part) {
    if (result == nullptr) return;
    T* const to = result + part.at;
    const bool packed = IsPacked(to);
    if (packed && part.begin == 0 && part.end == kTile) {
#pragma unroll
      for (int j = 0; j < kPackets; ++j) {
        const int p = j * kWarp + Lane();
        *reinterpret_cast<Packet<T>*>(to + p * kPacket) = slot[Place(p)];
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kPackets; ++j) {
      const int p = j * kWarp + Lane(), i = p * kPacket;
      const Packet<T>& packet = slot[Place(p)];
      if (packed && i >= part.begin && i + kPacket <= part.end) {
        *reinterpret_cast<Packet<T>*>(to + i) = packet;
      } else {
#pragma unroll 1
        for (int e = max(part.begin - i, 0); e < min(part.end - i, kPacket); ++e) to[i + e] = packet.x[e];
      }
    }
  }

  // Adds this lane's share of half the ray's loss, or of its tangent, and of the interval's gradient.
  static __device__ __forceinline__ void Compute(const Ray<T>& ray, Packet<T>* slots, T& loss, T& interval_sum) {
    // What is to the right of a tile waits at its first sample. There is room, since the tile is not the last.
    T* const bars = ray.w_bar != nullptr ? ray.w_bar : ray.m_bar;
    const auto copy = [](const T* from, T* to) {
#pragma unroll
      for (int i = 0; i < int{sizeof(Sums) / sizeof(T)}; ++i) to[i] = from[i];
    };
    const int last = (ray.length + ray.shift - 1) / kTile * kTile - ray.shift;  // where the last tile begins
    const bool both_sides = kWeights && (!kAll || bars != nullptr);  // else the loss is counted from the left alone
    bool sweep = both_sides && last > 0;
    Sums left_of = {}, right_of = {};  // the tiles still to come
    const N shared =
        ray.shared_interval ? Make(*ray.interval, ray.v_interval == nullptr ? T(0) : *ray.v_interval) : N{};
    for (int at = sweep ? last : -ray.shift; at < ray.length;) {
      const Part part(ray, at);
      N w[kEach], m[kEach];
      LoadAll(ray.w, ray.v_w, part, w);
      LoadAll(ray.m, ray.v_m, part, m);

      // Sums within the run: of the moments on both sides, and the difference of their masses.
      N moments[kEach] = {}, balance[kEach] = {}, mass = {}, moment = {};
      Sums left = {}, right = {};
      if (both_sides) {
#pragma unroll
        for (int e = kEach - 1; e >= 0; --e) {
          if (e < kEach - 1) moment = MultiplyAdd(mass, m[e + 1] - m[e], moment);
          moments[e] = moment;
          balance[e] = mass;
          mass = mass + w[e];
        }
        right = {mass, moment, Scale(-1, m[0])};
        if (sweep) {
          LookBeyond<kWeights>(left, right, left_of, right_of, true);
          at -= kTile;
          if (Lane() == 0) copy(reinterpret_cast<const T*>(&right_of), bars + max(at, 0));
          __syncwarp();
          sweep = at > 0;
          left_of = {};
          continue;
        }
        if (at == last) {
          right_of = {};
        } else {
          copy(bars + max(at, 0), reinterpret_cast<T*>(&right_of));
        }
      }
      mass = moment = N{};
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (e > 0) moment = MultiplyAdd(mass, m[e] - m[e - 1], moment);
        moments[e] = moment + moments[e];
        balance[e] = mass - balance[e];
        mass = mass + w[e];
      }
      left = {mass, moment, m[kEach - 1]};
      LookBeyond<kWeights>(left, right, left_of, right_of, at < last);

      const N moment_outside = left.moment + right.moment;
      const auto mass_outside = left.mass + Negative(right.mass);
      const T factor = 2 * ray.ct;
      Packet<T>*const w_slot = slots, *const m_slot = slots + kWarp * kPackets,
                      *const interval_slot = slots + 2 * kWarp * kPackets;
#pragma unroll
      for (int j = 0; j < kPackets; ++j) {
        N interval[kPacket];
        if (ray.shared_interval) {
#pragma unroll
          for (int k = 0; k < kPacket; ++k) interval[k] = shared;
        } else {
          const int i = Lane() * kEach + j * kPacket;
          const Packet<T> value = Load(ray.interval, part, i);
          Packet<T> tangent = {};
          if (kTangents && ray.v_interval != nullptr) tangent = Load(ray.v_interval, part, i);
#pragma unroll
          for (int k = 0; k < kPacket; ++k) interval[k] = Make(value.x[k], tangent.x[k]);
        }
        Packet<T> w_bar, m_bar, interval_bar;
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
          const int e = j * kPacket + k;
          // The gradients add what is on both sides, masses with opposite signs. So may the loss, of whose pairs each
          // then counts from both sides.
          Side<N> both = {Plus(mass_outside, balance[e]), moment_outside + moments[e]};
          both.moment = MultiplyAdd(Rounded(left.mass), m[e] - left.x, both.moment);
          if constexpr (kWeights) {
            both.moment = MultiplyAdd(Rounded(right.mass), Scale(-1, m[e]) - right.x, both.moment);
            w_bar.x[k] = factor * Result(HalfWeightBar(w[e], interval[k], both));
          }
          if constexpr (kAll) {
            m_bar.x[k] = factor * Result(HalfPositionBar(w[e], both));
            interval_bar.x[k] = factor * Result(HalfIntervalBar(w[e]));
            interval_sum += interval_bar.x[k];
          }
          if constexpr (kTangents || !kWeights) {
            if (both_sides) both.moment = Scale(0.5, both.moment);
            loss += Result(HalfLoss(w[e], interval[k], both));
          }
        }
        const int place = Place(Lane() * kPackets + j);
        if constexpr (kWeights) w_slot[place] = w_bar;
        if constexpr (kAll) m_slot[place] = m_bar, interval_slot[place] = interval_bar;
      }
      __syncwarp();
      if constexpr (kWeights) Store(w_slot, ray.w_bar, part);
      if constexpr (kAll) {
        Store(m_slot, ray.m_bar, part);
        Store(interval_slot, ray.interval_bar, part);
      }
      __syncwarp();  // before the next tile's take their place
      at += kTile;
    }
  }
};

// Registers bound how many packets a lane can have.
template <class T, class N>
constexpr int kMaxPackets = 4 * sizeof(T) / sizeof(N);

// Warps that are to fit on a multiprocessor. More loads are then under way; but fewer registers are left for each.
template <class N, Gradients kGradients>
constexpr int kMinWarps = sizeof(N) == 16                  ? 8
                          : sizeof(N) == 8                 ? 12
                          : kGradients == Gradients::kNone ? 20
                                                           : 16;

template <class T, bool kTangents, Gradients kGradients, class N = std::conditional_t<kTangents, Dual<T>, T>>
__global__ void __launch_bounds__(kWarps* kWarp, (kMinWarps<N, kGradients> / kWarps))
    RayKernel(const Distortion<T> args, int64_t rows) {
  constexpr int kMost = kMaxPackets<T, N>, kResults = kGradients == Gradients::kAll ? 3 : 1;
  __shared__ Packet<T> slots[kWarps][kResults * kMost * kWarp];
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarp;
  int64_t b = row, r = 0, begin = 0, end = args.N;
  if (args.offsets.data != nullptr) {
    const int64_t rays = Rows(args);
    b = rows == rays ? 0 : row / rays;
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
  ray.length = static_cast<int>(end - begin);
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
  constexpr int kPacket = Packet<T>::kSize;
  ray.shift = static_cast<int>(reinterpret_cast<uintptr_t>(ray.w) / sizeof(T) % kPacket);

  const int64_t packets = (end - begin + ray.shift + kPacket * kWarp - 1) / (kPacket * kWarp);
  Packet<T>* const slot = slots[threadIdx.x / kWarp];
  T loss = 0, interval_sum = 0;
  if (packets <= 1) {
    Tiles<T, kTangents, kGradients, 1>::Compute(ray, slot, loss, interval_sum);
  } else if (kMost == 2 || packets <= 2) {
    Tiles<T, kTangents, kGradients, 2>::Compute(ray, slot, loss, interval_sum);
  } else {
    Tiles<T, kTangents, kGradients, kMost>::Compute(ray, slot, loss, interval_sum);
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
  // A ray's samples are counted in 32 bits.
  if (cudaError_t error = CheckGrid(max(blocks, args.N)); error != cudaSuccess) return error;
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
