// The distortion loss on CUDA: one warp a ray; of ragged rays, where there are many, one warp for a few.
//
// A ray goes through in tiles, of which each lane has a run of neighbouring samples in registers. It sums its run from
// either end, shuffles join the runs, and from what is on either side of its run each lane completes the sums of
// formulas.h for its samples. Gradients are put in order in shared memory, so that they are written in whole lines.
//
// Of a ray of several tiles, a sweep from the right sums all but the first, before any gradient is computed. What is to
// the right of a tile waits in scratch.

#include <type_traits>

#include "common/cuda.cuh"
#include "distortion/cuda.h"
#include "distortion/formulas.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kWarps = 2;  // of a block, which is (kWarp, kWarps) threads; they have nothing in common

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
  const int lane = threadIdx.x;
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

// The sum over all lanes, of what WarpSum does not take: dual numbers and twofold sums.
template <class S>
__device__ __forceinline__ S Total(S x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = x + Shuffle(x, static_cast<int>(threadIdx.x) ^ step);
  return x;
}

// Sums over neighbouring samples, in the order of x, which is m in a sweep from the left and −m in one from the right.
template <class N, class Mass>
struct Run {
  Mass mass;
  N moment;  // about x
  N x;       // of the last sample
};

// Replaces this lane's run, as seen from the left and, if that is wanted, from the right, by what is beyond it on that
// side: the runs of the lanes there, and behind them what is beyond the tile. If there are more tiles to the right, all
// runs then join what is to the left of them.
template <bool kRight, class Run>
__device__ __forceinline__ void LookBeyond(Run& left, Run& right, Run& left_of, const Run& right_of, bool more) {
  const int lane = threadIdx.x, last = kWarp - 1;
  auto left_mass = left.mass, right_mass = right.mass;
  RunningSums<kRight>(left_mass, right_mass);
  Run on_left = {left_of.mass + Shuffle(left_mass, lane - 1), {}, Shuffle(left.x, lane - 1)}, on_right = {};
  if (lane == 0) on_left = left_of;
  if constexpr (kRight) {
    on_right = {right_of.mass + Shuffle(right_mass, lane + 1), {}, Shuffle(right.x, lane + 1)};
    if (lane == last) on_right = right_of;
  }
  // From run to run, the moment of all that is beyond grows by its mass times the way.
  auto left_moment = MultiplyAdd(Rounded(on_left.mass), left.x - on_left.x, left.moment);
  auto right_moment = MultiplyAdd(Rounded(on_right.mass), right.x - on_right.x, right.moment);
  RunningSums<kRight>(left_moment, right_moment);
  on_left.moment = left_of.moment + Shuffle(left_moment, lane - 1);
  if (lane == 0) on_left.moment = left_of.moment;
  if constexpr (kRight) {
    on_right.moment = right_of.moment + Shuffle(right_moment, lane + 1);
    if (lane == last) on_right.moment = right_of.moment;
  }
  if (more) {
    left_of = {left_of.mass + Shuffle(left_mass, last), left_of.moment + Shuffle(left_moment, last),
               Shuffle(left.x, last)};
  }
  left = on_left;
  right = on_right;
}

// Asks for the line of an address to be in the L2 cache.
__device__ __forceinline__ void Prefetch(const void* a) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(a)));
}

template <class T>
struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// A batch entry: its arrays, null where not given or not wanted.
template <class T>
struct Entry {
  int samples;
  const T *w, *m, *interval, *v_w, *v_m, *v_interval;
  T *w_bar, *m_bar, *interval_bar;
  T* right_sums;
  bool shared_interval;
};

// A ray has the samples [begin, end) of its entry.
template <class T>
struct Ray {
  int begin, end;
  T ct, v_ct;
  bool ct_moves;
};

template <class T, bool kFlat, bool kTangents, Gradients kGradients, int kPackets>
struct Tiles {
  using N = std::conditional_t<kTangents, Dual<T>, T>;
  static constexpr bool kWeights = kGradients != Gradients::kNone, kAll = kGradients == Gradients::kAll;
  using Sums = Run<N, std::conditional_t<kAll, Twofold<N>, N>>;
  static constexpr int kPacket = Packet<T>::kSize;
  static constexpr int kEach = kPackets * kPacket;  // samples of a lane
  static constexpr int kTile = kWarp * kEach;

  // The tile that begins at sample `at`. Its samples [begin, end) are the ray's.
  struct Part {
    int at, begin, end;
    bool whole;   // all of its samples are
    bool packed;  // packets with samples of the ray do not reach out of the entry: they can be loaded as they are
    __device__ __forceinline__ Part(const Entry<T>& entry, const Ray<T>& ray, int at)
        : at(at),
          begin(max(ray.begin - at, 0)),
          end(min(ray.end - at, kTile)),
          whole(begin == 0 && end == kTile),
          packed(at >= 0 && at + (end + kPacket - 1) / kPacket * kPacket <= entry.samples) {}
    // Whether sample i + e of the tile is the ray's, where i is a packet's first. Only a tile's first packet can begin
    // before the ray, and its last sample is the ray's.
    __device__ __forceinline__ bool Has(int i, int e) const {
      return (e >= kPacket - 1 || e >= begin - i) && e < end - i;
    }
    __device__ __forceinline__ bool HasPacket(int i, int j) const {
      return Has(i, j * kPacket) && Has(i, j * kPacket + kPacket - 1);
    }
  };

  static __device__ __forceinline__ int Lane() { return threadIdx.x; }
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

  // Of an array, packets [0, kCount) from sample i of a tile on. What is in them outside the ray is for Combine to
  // drop: once all loads are under way.
  template <int kCount>
  static __device__ __forceinline__ void Load(const T* a, const Part& part, int i, Packet<T> (&packets)[kCount]) {
    a += part.at + i;
    const auto packet = [&](int j) { return reinterpret_cast<const Packet<T>*>(a)[j]; };
    const bool packed = IsPacked(a);
    if (!kFlat && packed && part.whole) {  // seldom so of ragged rays
#pragma unroll
      for (int j = 0; j < kCount; ++j) packets[j] = packet(j);
    } else if (packed && part.packed) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (i + j * kPacket < part.end) packets[j] = packet(j);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if (packed && part.HasPacket(i, j)) {
          packets[j] = packet(j);
        } else {
#pragma unroll
          for (int k = 0; k < kPacket; ++k) {
            if (part.Has(i, j * kPacket + k)) packets[j].x[k] = a[j * kPacket + k];
          }
        }
      }
    }
  }

  // Samples of packets from sample i of a tile on; zeros outside the ray, whose weight changes no sum that is used.
  template <int kCount>
  static __device__ __forceinline__ void Combine(const Packet<T> (&values)[kCount], const Packet<T> (&tangents)[kCount],
                                                 const Part& part, int i, N (&x)[kCount * kPacket]) {
#pragma unroll
    for (int e = 0; e < kCount * kPacket; ++e) {
      x[e] = Make(values[e / kPacket].x[e % kPacket], tangents[e / kPacket].x[e % kPacket]);
    }
    if (part.whole) return;
#pragma unroll
    for (int e = 0; e < kCount * kPacket; ++e) {
      if (!part.Has(i, e)) x[e] = {};
    }
  }

  // Where packet p of a tile is in shared memory: neighbouring lanes meet different banks, whether they access
  // neighbouring packets or have kPackets neighbouring ones each.
  static __device__ __forceinline__ int Place(int p) { return p ^ (p / 8 & (kPackets - 1)); }

  // Writes a tile of a result.
  static __device__ __forceinline__ void Store(const Packet<T>* slot, T* result, const Part& part) {
    if (result == nullptr) return;
    T* const to = result + part.at;
    const bool packed = IsPacked(to);
#pragma unroll
    for (int j = 0; j < kPackets; ++j) {
      const int p = j * kWarp + Lane(), i = p * kPacket;
      const Packet<T> packet = slot[Place(p)];
      if (packed && (part.whole || part.HasPacket(i, 0))) {
        *reinterpret_cast<Packet<T>*>(to + i) = packet;
      } else {
#pragma unroll
        for (int k = 0; k < kPacket; ++k) {
          if (part.Has(i, k)) to[i + k] = packet.x[k];
        }
      }
    }
  }

  // Adds this lane's share of half the ray's loss, or of its tangent, and of the interval's gradient.
  static __device__ __forceinline__ void Compute(const Entry<T>& entry, const Ray<T>& ray, Packet<T>* slots, T& loss,
                                                 T& interval_sum) {
    // What is to the right of tiles between the first and the last. They are whole, so no two begin in the same kTile.
    static_assert(kTile * sizeof(T) >= kTileBytes && sizeof(Sums) <= kRightSums * sizeof(T));
    const auto right_sums = [&](int at) {
      return reinterpret_cast<Sums*>(entry.right_sums) + static_cast<unsigned>(at) / kTile;
    };
    // Where tiles begin: so that packets are aligned.
    const int first =
        ray.begin - static_cast<int>((reinterpret_cast<uintptr_t>(entry.w) / sizeof(T) + ray.begin) % kPacket);
    const int last = first + (ray.end - first - 1) / kTile * kTile;
    // Else the loss is counted from the left alone.
    const bool both_sides = kWeights && (!kAll || entry.w_bar != nullptr || entry.m_bar != nullptr);
    bool sweep = both_sides && last > first;
    Sums left_of = {}, right_of = {};  // the tiles still to come
    const N shared =
        entry.shared_interval ? Make(*entry.interval, entry.v_interval == nullptr ? T(0) : *entry.v_interval) : N{};
    for (int at = sweep ? last : first; at < ray.end;) {
      const Part part(entry, ray, at);
      const int i = Lane() * kEach;
      Packet<T> packets[4][kPackets] = {};
      Load(entry.w, part, i, packets[0]);
      Load(entry.m, part, i, packets[1]);
      if (kTangents && entry.v_w != nullptr) Load(entry.v_w, part, i, packets[2]);
      if (kTangents && entry.v_m != nullptr) Load(entry.v_m, part, i, packets[3]);
      N w[kEach], m[kEach];
      Combine(packets[0], packets[2], part, i, w);
      Combine(packets[1], packets[3], part, i, m);

      if (sweep) {
        const N origin = Shuffle(m[0], 0);
        N mass = {}, moment = {};
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          mass = mass + w[e];
          moment = MultiplyAdd(w[e], m[e] - origin, moment);
        }
        const N way = Scale(-1, origin) - right_of.x;
        right_of.moment = MultiplyAdd(Rounded(right_of.mass), way, right_of.moment) + Total(moment);
        right_of.mass = right_of.mass + Total(decltype(right_of.mass)(mass));
        right_of.x = Scale(-1, origin);
        at -= kTile;
        sweep = at > first;
        if (sweep && Lane() == 0) *right_sums(at) = right_of;
        __syncwarp();
        continue;
      }
      if (at == last) {
        right_of = {};
      } else if (both_sides && at > first) {
        right_of = *right_sums(at);
      }

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
      const T factor = 2 * ray.ct, v_factor = 2 * ray.v_ct;
      const auto weighted = [&](const N& half_bar) {
        if constexpr (kTangents) {
          const T product = factor * half_bar.tangent;
          return ray.ct_moves ? fma(v_factor, half_bar.value, product) : product;
        } else {
          return factor * half_bar;
        }
      };
      Packet<T>*const w_slot = slots, *const m_slot = slots + kWarp * kPackets,
                      *const interval_slot = slots + 2 * kWarp * kPackets;
#pragma unroll
      for (int j = 0; j < kPackets; ++j) {
        N interval[kPacket];
        if (entry.shared_interval) {
#pragma unroll
          for (int k = 0; k < kPacket; ++k) interval[k] = shared;
        } else {
          Packet<T> value[1] = {}, tangent[1] = {};
          Load(entry.interval, part, i + j * kPacket, value);
          if (kTangents && entry.v_interval != nullptr) Load(entry.v_interval, part, i + j * kPacket, tangent);
          Combine(value, tangent, part, i + j * kPacket, interval);
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
            w_bar.x[k] = weighted(HalfWeightBar(w[e], interval[k], both));
          }
          if constexpr (kAll) {
            m_bar.x[k] = weighted(HalfPositionBar(w[e], both));
            interval_bar.x[k] = weighted(HalfIntervalBar(w[e]));
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
      if constexpr (kWeights) Store(w_slot, entry.w_bar, part);
      if constexpr (kAll) {
        Store(m_slot, entry.m_bar, part);
        Store(interval_slot, entry.interval_bar, part);
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
template <class N>
constexpr int kMinWarps = sizeof(N) == 16  ? 8
                          : sizeof(N) == 8 ? 16
                                           : 20;

template <class T, bool kFlat, bool kTangents, Gradients kGradients, int kPackets,
          class N = std::conditional_t<kTangents, Dual<T>, T>>
__global__ void __launch_bounds__(kWarps* kWarp, kMinWarps<N> / kWarps)
    RayKernel(const Distortion<T> args, uint32_t warps, uint32_t groups, int rays_each) {
  constexpr int kResults = kGradients == Gradients::kAll ? 3 : 1;
  __shared__ Packet<T> all_slots[kWarps][kResults * kPackets * kWarp];
  // The shuffle tells the compiler that all lanes have the same: what follows from it takes no registers of theirs.
  const int in_block = Shuffle(static_cast<int>(threadIdx.y), 0), lane = threadIdx.x;
  const uint32_t warp = blockIdx.x * kWarps + in_block;
  if (warp >= warps) return;
  Packet<T>* const slots = all_slots[in_block];
  const uint32_t b = kFlat ? warp / groups : warp, group = kFlat ? warp - b * groups : 0;
  const auto operand = [&](const Operand<const T>& a) { return AtOrNull(a, args.batch, b); };
  const auto result = [&](T* a) { return a == nullptr ? nullptr : a + b * args.N; };
  Entry<T> entry;
  entry.samples = static_cast<int>(args.N);
  entry.w = operand(args.w);
  entry.m = operand(args.m);
  entry.interval = operand(args.interval);
  entry.v_w = operand(args.v_w);
  entry.v_m = operand(args.v_m);
  entry.v_interval = operand(args.v_interval);
  entry.w_bar = result(args.w_bar);
  entry.m_bar = result(args.m_bar);
  entry.interval_bar = args.shared_interval ? nullptr : result(args.interval_bar);
  entry.right_sums = args.right_sums + int64_t{b} * WholeTiles(args) * kRightSums;
  entry.shared_interval = args.shared_interval;

  const int64_t first = int64_t{group} * rays_each;
  const int rays = kFlat ? static_cast<int>(Min(args.R - first, rays_each)) : 1;
  int offset = 0;  // where this lane's ray begins
  if constexpr (kFlat) {
    const int32_t* offsets = At(args.offsets, args.batch, b);
    if (lane <= rays) offset = offsets[first + lane];
    if constexpr (kGradients != Gradients::kNone) {
      // Samples outside all rays, which may be many where arrays are padded, are shared out among the entry's warps.
      const int before = offsets[0], behind = offsets[args.R], outside = before + (entry.samples - behind);
      for (int64_t i = int64_t{group} * kWarp + lane; i < outside; i += int64_t{groups} * kWarp) {
        const int64_t at = i < before ? i : i - before + behind;
        if (entry.w_bar != nullptr) entry.w_bar[at] = 0;
        if (entry.m_bar != nullptr) entry.m_bar[at] = 0;
        if (entry.interval_bar != nullptr) entry.interval_bar[at] = 0;
      }
    }
  }

  const T *const ct = operand(args.ct), *const v_ct = kTangents ? operand(args.v_ct) : nullptr;
  const auto prefetch = [&](int i) {
    const int at = Shuffle(offset, i) + lane * (128 / static_cast<int>(sizeof(T)));
    if (at >= Shuffle(offset, i + 1)) return;
    Prefetch(entry.w + at);
    Prefetch(entry.m + at);
  };
  if (kFlat && rays > 0) prefetch(0);  // for its second tile
#pragma unroll 1
  for (int i = 0; i < rays; ++i) {
    if (kFlat && i + 1 < rays) prefetch(i + 1);
    const Ray<T> ray = {kFlat ? Shuffle(offset, i) : 0, kFlat ? Shuffle(offset, i + 1) : entry.samples,
                        ct == nullptr ? T(0) : ct[first + i], v_ct == nullptr ? T(0) : v_ct[first + i],
                        v_ct != nullptr};
    T loss = 0, interval_sum = 0;
    if (ray.begin < ray.end) {
      Tiles<T, kFlat, kTangents, kGradients, kPackets>::Compute(entry, ray, slots, loss, interval_sum);
    }
    const int64_t at = b * args.R + first + i;
    if (args.loss != nullptr) {
      loss = 2 * WarpSum(loss);
      if (lane == 0) args.loss[at] = loss;
    }
    if (args.interval_bar != nullptr && args.shared_interval) {
      interval_sum = WarpSum(interval_sum);
      if (lane == 0) args.interval_bar[at] = interval_sum;
    }
  }
}

// Whether few kernels are compiled for T, each for more cases than would be fastest.
template <class T>
constexpr bool kLean = sizeof(T) == 8;

template <class T, bool kFlat, bool kTangents, Gradients kGradients>
cudaError_t LaunchRays(const Distortion<T>& args, cudaStream_t stream) {
  // Where there are rays enough for all multiprocessors, a warp has several, and asks for the next one's samples ahead.
  const int64_t entries = Count(args.batch), rays_each = Max(1, Min(4, entries * args.R / 8192));
  const int64_t groups = CeilDiv(Rows(args), rays_each), warps = entries * groups, blocks = CeilDiv(warps, kWarps);
  if (blocks == 0) return cudaSuccess;
  // Samples are counted in 32 bits, up to the end of the last tile.
  if (cudaError_t error = CheckGrid(Max(blocks, args.N + 1024)); error != cudaSuccess) return error;
  const auto launch = [&](auto kernel) {
    kernel<<<static_cast<unsigned>(blocks), dim3(kWarp, kWarps), 0, stream>>>(
        args, static_cast<uint32_t>(warps), static_cast<uint32_t>(groups), static_cast<int>(rays_each));
    return cudaGetLastError();
  };
  // Tiles hold a ray of mean length, if registers allow. One size for all rays of a call: with code for several in one
  // kernel, warps would evict each other's instructions from the cache. Doubles, which are rare, have one in all.
  if constexpr (kLean<T>) {
    return launch(RayKernel<T, kFlat, kTangents, kGradients, 2>);
  } else {
    using N = std::conditional_t<kTangents, Dual<T>, T>;
    const int64_t packets = CeilDiv(args.N, Rows(args) * kWarp * Packet<T>::kSize);
    if (packets <= 1) return launch(RayKernel<T, kFlat, kTangents, kGradients, 1>);
    if (packets == 2) return launch(RayKernel<T, kFlat, kTangents, kGradients, 2>);
    return launch(RayKernel<T, kFlat, kTangents, kGradients, kMaxPackets<T, N>>);
  }
}

template <class T, bool kFlat>
cudaError_t Launch(const Distortion<T>& args, cudaStream_t stream) {
  constexpr Gradients kNone = Gradients::kNone, kWeights = Gradients::kWeights, kAll = Gradients::kAll;
  const bool gradients = WantsGradients(args), all = args.m_bar != nullptr || args.interval_bar != nullptr;
  if (HasTangents(args)) {
    return gradients ? LaunchRays<T, kFlat, true, kAll>(args, stream) : LaunchRays<T, kFlat, true, kNone>(args, stream);
  }
  if (!gradients) return LaunchRays<T, kFlat, false, kNone>(args, stream);
  if (all || kLean<T>) return LaunchRays<T, kFlat, false, kAll>(args, stream);
  return LaunchRays<T, kFlat, false, kLean<T> ? kAll : kWeights>(args, stream);
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
  return args.offsets.data == nullptr ? Launch<T, false>(args, stream) : Launch<T, true>(args, stream);
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
