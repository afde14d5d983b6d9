// The distortion loss on CPUs: a vector of samples at a time.
//
// A sweep from the right leaves its parts of the gradients in the results, and one from the left adds the rest.

#include "distortion/cpu.h"

#include <type_traits>
#include <utility>

#include "common/simd.h"
#include "distortion/formulas.h"

namespace knn::KNN_ISA {
namespace {

// Moves lanes `step` on in the direction of the sweep; those that come free are filled with the last ones of `before`.
template <bool kForward, int step, class T, int... lane>
KNN_FN Vec<T> Shift(Vec<T> before, Vec<T> x, std::integer_sequence<int, lane...>) {
  if constexpr (kForward) {
    return Lanes<(lane + Vec<T>::kLanes - step)...>(before, x);
  } else {
    return Lanes<(lane + step)...>(x, before);
  }
}
template <bool kForward, int step = 1, class T>
KNN_FN Vec<T> Shift(Vec<T> before, Vec<T> x) {
  return Shift<kForward, step>(before, x, std::make_integer_sequence<int, Vec<T>::kLanes>());
}
template <bool kForward, class T>
KNN_FN Dual<Vec<T>> Shift(Dual<Vec<T>> before, Dual<Vec<T>> x) {
  return {Shift<kForward>(before.value, x.value), Shift<kForward>(before.tangent, x.tangent)};
}

// The sum of each lane and all before it.
template <bool kForward, int step = 1, class T>
KNN_FN Vec<T> RunningSum(Vec<T> x) {
  if constexpr (step == Vec<T>::kLanes) {
    return x;
  } else {
    return RunningSum<kForward, 2 * step>(x + Shift<kForward, step>(Vec<T>::Broadcast(0), x));
  }
}
template <bool kForward, class T>
KNN_FN Dual<Vec<T>> RunningSum(Dual<Vec<T>> x) {
  return {RunningSum<kForward>(x.value), RunningSum<kForward>(x.tangent)};
}

// What a sweep carries from vector to vector. In double, so that the length of a ray does not show in the error.
template <bool kForward, class T>
struct Carry {
  double sum = 0;
  KNN_FN Vec<T> Before() const { return Vec<T>::Broadcast(static_cast<T>(sum)); }
  KNN_FN void Add(Vec<T> running) { sum += running.v[kForward ? Vec<T>::kLanes - 1 : 0]; }
};
template <bool kForward, class T>
struct DualCarry {
  Carry<kForward, T> value, tangent;
  KNN_FN Dual<Vec<T>> Before() const { return {value.Before(), tangent.Before()}; }
  KNN_FN void Add(Dual<Vec<T>> running) { value.Add(running.value), tangent.Add(running.tangent); }
};

// Goes along a ray and keeps the sums of formulas.h. N is a vector of T or a dual number of such.
template <bool kForward, class T, class N>
class Sweep {
 public:
  // The sums over all samples passed before each of the next ones.
  KNN_FN Side<N> Next(N w, N m) {
    const N before = mass_.Before(), masses = RunningSum<kForward>(w);
    const N mass = before + Shift<kForward>(N{}, masses);
    mass_.Add(masses);
    const N gap = kForward ? m - Shift<kForward>(m_, m) : Shift<kForward>(m_, m) - m;
    m_ = m;
    const N moments = RunningSum<kForward>(gap * mass), moment = moment_.Before() + moments;
    moment_.Add(moments);
    return {mass, moment};
  }

 private:
  std::conditional_t<std::is_same_v<N, Vec<T>>, Carry<kForward, T>, DualCarry<kForward, T>> mass_, moment_;
  N m_ = {};  // the first gap is that to 0, and meets no mass
};

// The n samples at `a`, then zeros to fill the vector. Zero weights behind the end change none of the sums that are
// used.
template <class T>
KNN_FN Vec<T> Load(const T* a, int64_t n) {
  if (n == Vec<T>::kLanes) return Vec<T>::Load(a);
  Vec<T> x = {};
  std::memcpy(&x, a, n * sizeof(T));
  return x;
}
template <class T>
KNN_FN void Store(Vec<T> x, int64_t n, T* a) {
  if (n == Vec<T>::kLanes) return x.Store(a);
  std::memcpy(a, &x, n * sizeof(T));
}

template <class T, bool kTangents>
struct Rays {
  using Args = Distortion<T>;
  using V = Vec<T>;
  static constexpr int64_t kLanes = V::kLanes;
  using N = std::conditional_t<kTangents, Dual<V>, V>;

  // An operand and its tangent, n samples of it.
  static KNN_FN N Read(const T* a, const T* v, int64_t i, int64_t n) {
    if constexpr (kTangents) {
      return {Load(a + i, n), v == nullptr ? V::Broadcast(0) : Load(v + i, n)};
    } else {
      return Load(a + i, n);
    }
  }
  static KNN_FN N ReadOne(const T* a, const T* v) {
    if constexpr (kTangents) {
      return {V::Broadcast(*a), V::Broadcast(v == nullptr ? 0 : *v)};
    } else {
      return V::Broadcast(*a);
    }
  }

  static int64_t RowsPerTask(const Args& args) { return Max(1, 16384 * Rows(args) / (args.N + Rows(args))); }
  static int64_t Tasks(const Args& args) { return CeilDiv(Count(args.batch) * Rows(args), RowsPerTask(args)); }

  static void Run(const Args& args, void* /*scratch*/, int64_t task) {
    const int64_t rows = Count(args.batch) * Rows(args), first = task * RowsPerTask(args);
    for (int64_t row = first; row < Min(first + RowsPerTask(args), rows); ++row) {
      const int64_t b = row / Rows(args), r = row % Rows(args);
      int64_t begin = 0, end = args.N;
      if (args.offsets.data != nullptr) {
        const int32_t* offsets = At(args.offsets, args.batch, b);
        if (r == 0) {
          Clear(args, b, 0, offsets[0]);
          Clear(args, b, offsets[args.R], args.N);
        }
        if (args.R == 0) continue;
        begin = offsets[r];
        end = offsets[r + 1];
      }
      Ray(args, b, r, begin, end);
    }
  }

  // Samples outside all rays.
  static void Clear(const Args& args, int64_t b, int64_t begin, int64_t end) {
    for (T* bar : {args.w_bar, args.m_bar, args.shared_interval ? nullptr : args.interval_bar}) {
      if (bar != nullptr) std::memset(bar + b * args.N + begin, 0, (end - begin) * sizeof(T));
    }
  }

  // Twice a ray's cotangent, as formulas give half of all gradients.
  struct Cotangent {
    V value, tangent;
    bool moves;
  };
  static KNN_FN V Twice(const Operand<const T>& a, const Batch& batch, int64_t b, int64_t r) {
    return V::Broadcast(a.data == nullptr ? 0 : 2 * At(a, batch, b)[r]);
  }

  // What both sweeps add to a gradient. Their sum is still to be multiplied by the cotangent, unless that moves: then
  // it differs for values and tangents, and so comes first.
  static KNN_FN V Part(N bar, const Cotangent& ct) {
    if constexpr (kTangents) {
      if (ct.moves) return ct.value * bar.tangent + ct.tangent * bar.value;
    }
    return Result(bar);
  }

  static void Ray(const Args& args, int64_t b, int64_t r, int64_t begin, int64_t end) {
    const Batch& batch = args.batch;
    const T *w = At(args.w, batch, b) + begin, *v_w = AtOrNull(args.v_w, batch, b);
    const T *m = At(args.m, batch, b) + begin, *v_m = AtOrNull(args.v_m, batch, b);
    const T *interval = At(args.interval, batch, b), *v_interval = AtOrNull(args.v_interval, batch, b);
    if (v_w != nullptr) v_w += begin;
    if (v_m != nullptr) v_m += begin;
    if (!args.shared_interval) {
      interval += begin;
      if (v_interval != nullptr) v_interval += begin;
    }
    const int64_t at = b * args.N + begin, length = end - begin;
    T* w_bar = args.w_bar == nullptr ? nullptr : args.w_bar + at;
    T* m_bar = args.m_bar == nullptr ? nullptr : args.m_bar + at;
    T* interval_bar = args.interval_bar == nullptr || args.shared_interval ? nullptr : args.interval_bar + at;

    const Cotangent ct = {Twice(args.ct, batch, b, r), Twice(args.v_ct, batch, b, r),
                          kTangents && args.v_ct.data != nullptr};
    const V factor = ct.moves ? V::Broadcast(1) : ct.value;

    if (w_bar != nullptr || m_bar != nullptr) {
      Sweep<false, T, N> sweep;
      for (int64_t i = (CeilDiv(length, kLanes) - 1) * kLanes; i >= 0; i -= kLanes) {
        const int64_t n = Min(kLanes, length - i);
        const N w_i = Read(w, v_w, i, n);
        const Side<N> right = sweep.Next(w_i, Read(m, v_m, i, n));
        if (w_bar != nullptr) Store(Part(HalfWeightBarFromRight(right), ct), n, w_bar + i);
        if (m_bar != nullptr) Store(Part(HalfPositionBarFromRight(w_i, right), ct), n, m_bar + i);
      }
    }

    V loss = V::Broadcast(0), interval_sum = V::Broadcast(0);
    Sweep<true, T, N> sweep;
    for (int64_t i = 0; i < length; i += kLanes) {
      const int64_t n = Min(kLanes, length - i);
      const N w_i = Read(w, v_w, i, n);
      const N interval_i = args.shared_interval ? ReadOne(interval, v_interval) : Read(interval, v_interval, i, n);
      const Side<N> left = sweep.Next(w_i, Read(m, v_m, i, n));
      loss = loss + Result(HalfLoss(w_i, interval_i, left));
      if (w_bar != nullptr) {
        Store(factor * (Load(w_bar + i, n) + Part(HalfWeightBar(w_i, interval_i, left), ct)), n, w_bar + i);
      }
      if (m_bar != nullptr) {
        Store(factor * (Load(m_bar + i, n) + Part(HalfPositionBar(w_i, left), ct)), n, m_bar + i);
      }
      if (interval_bar != nullptr) Store(factor * Part(HalfIntervalBar(w_i), ct), n, interval_bar + i);
      interval_sum = interval_sum + Part(HalfIntervalBar(w_i), ct);
    }
    if (args.loss != nullptr) args.loss[b * args.R + r] = 2 * Sum(loss);
    if (args.interval_bar != nullptr && args.shared_interval) {
      // Of a ray without samples it is 0, whatever its cotangent is.
      args.interval_bar[b * args.R + r] = length == 0 ? 0 : Sum(factor * interval_sum);
    }
  }
};

constexpr int64_t kOffsetsPerTask = 1024;
int64_t OffsetTasks(const RayOffsets& args) { return CeilDiv(Count(args.batch) * (args.R + 1), kOffsetsPerTask); }

void FindOffsets(const RayOffsets& args, void* /*scratch*/, int64_t task) {
  const int64_t end = Min((task + 1) * kOffsetsPerTask, Count(args.batch) * (args.R + 1));
  for (int64_t i = task * kOffsetsPerTask; i < end; ++i) {
    const int64_t b = i / (args.R + 1), r = i % (args.R + 1);
    const int32_t* ray_id = At(args.ray_id, args.batch, b);
    args.offsets[i] = static_cast<int32_t>(LowerBound(ray_id, args.N, static_cast<int32_t>(r)));
  }
}

}  // namespace

template <class T>
CpuKernel<Distortion<T>> DistortionKernel(const Distortion<T>& args) {
  if (HasTangents(args)) return {nullptr, {{&Rays<T, true>::Tasks, &Rays<T, true>::Run}, {nullptr, nullptr}}};
  return {nullptr, {{&Rays<T, false>::Tasks, &Rays<T, false>::Run}, {nullptr, nullptr}}};
}
template CpuKernel<Distortion<float>> DistortionKernel(const Distortion<float>&);
template CpuKernel<Distortion<double>> DistortionKernel(const Distortion<double>&);

CpuKernel<RayOffsets> RayOffsetsKernel() { return {nullptr, {{&OffsetTasks, &FindOffsets}, {nullptr, nullptr}}}; }

}  // namespace knn::KNN_ISA
