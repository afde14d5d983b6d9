// The aggregate op and its derivatives on CUDA, without atomics: every result is owned by one warp, which sums in a
// fixed order, so results have the same bits from run to run.
//
// A warp per query does what belongs to queries. Its lanes are now pairs (one neighbour each, for distances and
// metrics), now features (for rows of f). Where gradients of points are wanted it leaves four factors a pair behind,
// and a warp per point then sums over the pairs that name the point, in the order that invert() fixed.

#include "aggregate/cuda.h"
#include "common/cuda.cuh"

namespace knn::KNN_ISA {
namespace {

constexpr int kWarps = 4;       // of a block of queries
constexpr int kPointWarps = 8;  // of a block of points

// kWidth features of a row that starts at `row`, widened.
template <int kWidth, class T, class TF>
__device__ __forceinline__ void LoadFeatures(const TF* row, T (&out)[kWidth]) {
  struct alignas(sizeof(TF) * kWidth) Pack {
    TF value[kWidth];
  };
  const Pack pack = *reinterpret_cast<const Pack*>(row);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out[i] = Widen(pack.value[i]);
}

template <int kWidth, class T, class TF>
__device__ __forceinline__ void StoreFeatures(const T (&in)[kWidth], TF* row) {
  struct alignas(sizeof(TF) * kWidth) Pack {
    TF value[kWidth];
  };
  Pack pack;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) Narrow(in[i], &pack.value[i]);
  *reinterpret_cast<Pack*>(row) = pack;
}

template <class M, class T>
__device__ __forceinline__ typename M::Parameters LoadParameters(const T* sigma, const T* R, int64_t j) {
  return M::Load(sigma + M::kSigma * j, M::kR > 0 ? R + M::kR * j : nullptr);
}

// Tangents of a point's parameters, zero where there are none.
template <class M, class T>
__device__ __forceinline__ typename M::Parameters LoadTangents(const T* sigma, const T* R, int64_t j) {
  return M::LoadTangents(sigma == nullptr ? nullptr : sigma + M::kSigma * j, R == nullptr ? nullptr : R + M::kR * j);
}

// Arrays of one batch entry; null where the operand is not given.
template <class Array>
__device__ __forceinline__ Array* AtIf(const Operand<Array>& operand, const Batch& batch, int64_t b) {
  return operand.data == nullptr ? nullptr : At(operand, batch, b);
}

template <class T>
__device__ __forceinline__ Vec3<T> Load3If(const T* a, int64_t i) {
  return a == nullptr ? Vec3<T>{0, 0, 0} : Load3(a + 3 * i);
}

// ⟨a, row j of b⟩ over features for the pairs that lanes hold: lane l gets that of its own j, 0 where j < 0.
//
// Rows are taken kGroup at a time, for as many loads in flight, and the lanes' partial sums are reduced together: each
// step hands half of the sums to the lane's partner, 9 shuffles for 8 sums instead of 40.
template <int kWidth, class T, class TF>
__device__ __forceinline__ T FeatureDots(const TF* a, const TF* b, int32_t j, int count, int64_t F) {
  constexpr int kGroup = 8;
  const int lane = threadIdx.x % kWarp;
  T mine = 0;
  for (int group = 0; group < count; group += kGroup) {
    T part[kGroup] = {};
    int32_t row[kGroup];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) row[g] = __shfl_sync(kFullMask, j, group + g);  // beyond count, j is −1
    for (int64_t at = lane * kWidth; at < F; at += kWarp * kWidth) {
      T x[kWidth];
      LoadFeatures(a + at, x);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (row[g] >= 0) {
          T y[kWidth];
          LoadFeatures(b + row[g] * F + at, y);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) part[g] = Fma(x[i], y[i], part[g]);
        }
      }
    }
#pragma unroll
    for (int half = kGroup / 2, bit = kWarp / 2; half > 0; half /= 2, bit /= 2) {
#pragma unroll
      for (int g = 0; g < half; ++g) {
        const bool high = (lane & bit) != 0;
        const T keep = high ? part[g + half] : part[g], give = high ? part[g] : part[g + half];
        part[g] = keep + __shfl_xor_sync(kFullMask, give, bit);
      }
    }
#pragma unroll
    for (int bit = kWarp / kGroup / 2; bit > 0; bit /= 2) part[0] += __shfl_xor_sync(kFullMask, part[0], bit);
    // The sum of row g is now in lanes g·4 to g·4 + 3.
    const T dot = __shfl_sync(kFullMask, part[0], lane % kGroup * (kWarp / kGroup));
    if (lane / kGroup * kGroup == group) mine = dot;
  }
  return mine;
}

enum class Order { kZeroth, kFirst, kSecond };

// The half that owns queries. Zeroth order writes f_out, w_out, dists. Second order writes their tangents there, which
// are the gradients in the cotangents as well.
template <class M, class T, class TF, Order kOrder, int kWidth>
__global__ void __launch_bounds__(kWarps* kWarp) QueryKernel(const Aggregate<T, TF> args, int64_t rows) {
  constexpr bool kFirst = kOrder == Order::kFirst, kSecond = kOrder == Order::kSecond;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;  // of a query, over the whole batch
  if (row >= rows) return;
  const int64_t b = row / args.Q, i = row % args.Q;
  const T* p = At(args.p, args.batch, b);
  const TF* f = At(args.f, args.batch, b);
  const T* sigma = At(args.sigma, args.batch, b);
  const T* R = M::kR > 0 ? At(args.R, args.batch, b) : nullptr;
  const int32_t* idxs = At(args.idxs, args.batch, b) + i * args.K;
  const Vec3<T> query = Load3(At(args.q, args.batch, b) + 3 * i);

  const TF* ct_f = kFirst || kSecond ? AtIf(args.ct_f, args.batch, b) : nullptr;
  const T* ct_w = kFirst || kSecond ? AtIf(args.ct_w, args.batch, b) : nullptr;
  const T* ct_d = kFirst || kSecond ? AtIf(args.ct_d, args.batch, b) : nullptr;
  if (ct_f != nullptr) ct_f += i * args.F;
  const T* v_p = kSecond ? AtIf(args.v_p, args.batch, b) : nullptr;
  const TF* v_f = kSecond ? AtIf(args.v_f, args.batch, b) : nullptr;
  const T* v_sigma = kSecond ? AtIf(args.v_sigma, args.batch, b) : nullptr;
  const T* v_R = kSecond && M::kR > 0 ? AtIf(args.v_R, args.batch, b) : nullptr;
  const Vec3<T> v_query = Load3If(kSecond ? AtIf(args.v_q, args.batch, b) : nullptr, i);
  const bool gradients = (kFirst || kSecond) && (args.q_bar != nullptr || args.factors != nullptr);

  // Lanes are pairs: what the lane's neighbour among start..start + 31 is and weighs. j < 0 where there is none.
  int32_t j = -1;
  Vec3<T> d, dd;
  typename M::Parameters m, dm;
  Pair<T> value, tangent;
  T w = 0;
  const auto visit = [&](int64_t start) {
    const int32_t given = start + lane < args.K ? idxs[start + lane] : -1;
    j = given >= 0 && given < args.P ? given : -1;
    w = 0;
    tangent = {0, 0};
    if (j < 0) return;
    d = query - Load3(p + 3 * int64_t{j});
    m = LoadParameters<M>(sigma, R, j);
    value = M::Value(m, d);
    if (kOrder != Order::kZeroth && value.dist == T(INFINITY)) {
      j = -1;
      return;
    }
    w = Exp(-value.exponent);
    if constexpr (kSecond) {
      dd = v_query - Load3If(v_p, j);
      dm = LoadTangents<M>(v_sigma, v_R, j);
      tangent = M::Tangent(m, d, dd, dm);
    }
  };

  Vec3<T> q_bar = {0, 0, 0};
  for (int64_t start = 0; start < args.K; start += kWarp) {
    visit(start);
    const int count = static_cast<int>(min(int64_t{kWarp}, args.K - start));
    const int64_t k = start + lane;
    if (!kFirst && lane < count) {
      if (args.w_out != nullptr) args.w_out[row * args.K + k] = kSecond ? -w * tangent.exponent : w;
      if (args.dists != nullptr) {
        args.dists[row * args.K + k] = kSecond ? tangent.dist : j < 0 ? T(INFINITY) : value.dist;
      }
    }
    if (!gradients) continue;

    // b = ⟨ct_f, f⟩ and a = ⟨ct_f, v_f⟩ of each pair.
    const T b_pair = ct_f == nullptr ? T(0) : FeatureDots<kWidth, T>(ct_f, f, j, count, args.F);
    const T a_pair = ct_f == nullptr || v_f == nullptr ? T(0) : FeatureDots<kWidth, T>(ct_f, v_f, j, count, args.F);
    if (j >= 0) {
      const T ct_w_pair = ct_w == nullptr ? T(0) : ct_w[i * args.K + k];
      const T ct_d_pair = ct_d == nullptr ? T(0) : ct_d[i * args.K + k];
      const PairFactors<T> factors = kSecond
                                         ? SecondOrderFactors(w, b_pair, ct_w_pair, ct_d_pair, a_pair, tangent.exponent)
                                         : FirstOrderFactors(w, b_pair, ct_w_pair, ct_d_pair);
      if (args.factors != nullptr) args.factors[row * args.K + k] = factors;
      if (args.q_bar != nullptr && HasMetricTerms(factors)) {
        typename M::Parameters unused = {};
        const Pair<T> c = {factors.dist, factors.exponent};
        Accumulate(q_bar,
                   kSecond ? M::SecondGradient(m, d, dd, dm, factors.a_e, c, unused) : M::Gradient(m, d, c, unused));
      }
    } else if (args.factors != nullptr && lane < count) {
      args.factors[row * args.K + k] = {0, 0, 0, 0};
    }
  }

  if ((kFirst || kSecond) && args.q_bar != nullptr) {
    const Vec3<T> sum = {WarpSum(q_bar.x), WarpSum(q_bar.y), WarpSum(q_bar.z)};
    if (lane < 3) args.q_bar[3 * row + lane] = lane == 0 ? sum.x : lane == 1 ? sum.y : sum.z;
  }

  // Lanes are features: Σ_k w f, or Σ_k w (v_f − s_e f), with one rounding at the end for 16-bit features. Of up to 32
  // neighbours the lanes still know what they weigh.
  if constexpr (!kFirst) {
    if (args.f_out == nullptr) return;
    for (int64_t block = 0; block < args.F; block += kWarp * kWidth) {
      const int64_t at = block + lane * kWidth;
      const bool inside = at < args.F;
      T sum[kWidth] = {};
      for (int64_t start = 0; start < args.K; start += kWarp) {
        if (args.K > kWarp) visit(start);
        const int count = static_cast<int>(min(int64_t{kWarp}, args.K - start));
#pragma unroll 4
        for (int l = 0; l < count; ++l) {
          const int64_t jl = __shfl_sync(kFullMask, j, l);
          const T w_l = __shfl_sync(kFullMask, w, l);
          const T s_l = kSecond ? __shfl_sync(kFullMask, tangent.exponent, l) : T(0);
          if (jl < 0 || !inside) continue;
          T x[kWidth], dx[kWidth] = {};
          LoadFeatures(f + jl * args.F + at, x);
          if (kSecond && v_f != nullptr) LoadFeatures(v_f + jl * args.F + at, dx);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) sum[e] = Fma(w_l, kSecond ? Fma(-s_l, x[e], dx[e]) : x[e], sum[e]);
        }
      }
      if (inside) StoreFeatures(sum, args.f_out + row * args.F + at);
    }
  }
}

// The half that owns points: their gradients, summed over all pairs that name the point.
//
// A warp takes a point. A point with a long list would keep its warp long after the others are done, so the whole block
// then shares its list, and the warps' sums are added in the order of warps.
template <class M, class T, class TF, bool kSecond, int kWidth>
__global__ void __launch_bounds__(kPointWarps* kWarp)
    PointKernel(const Aggregate<T, TF> args, const SplitBatch split, int64_t rows) {
  constexpr int kTerms = 3 + M::kSigma + M::kR;
  constexpr int kLong = 4 * kWarp;
  __shared__ T partial[kPointWarps][kTerms > kWarp * kWidth ? kTerms : kWarp * kWidth];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  __shared__ bool is_long[kPointWarps];
  const bool geometry = args.p_bar != nullptr || args.sigma_bar != nullptr || args.R_bar != nullptr;

  // The pairs that name point `row`, counted over the kept batch.
  struct List {
    int64_t c, j, b0;
    const int32_t* order;
    int64_t begin, end;
  };
  const auto list_of = [&](int64_t row) {
    List list;
    list.c = row / args.P;
    list.j = row % args.P;
    // What belongs to points does not vary along summed axes: their entry 0 serves.
    list.b0 = Join(split, list.c, 0);
    list.order = At(args.order, args.batch, list.b0);
    const int32_t* offsets = At(args.offsets, args.batch, list.b0) + list.j;
    list.begin = offsets[0];
    list.end = offsets[1];
    return list;
  };
  // The query of pair number n, as an entry of the full batch and an index there.
  const auto query_of = [&](const List& list, int32_t n, int64_t& b, int64_t& i) {
    const int64_t in_all = n / args.K;
    i = in_all % args.Q;
    b = Join(split, list.c, in_all / args.Q);
  };

  // Lanes are pairs: gradients through the metric, of the share of warp `first` of `warps`.
  const auto sum_geometry = [&](const List& list, int first, int warps, Vec3<T>& d_bar, typename M::Parameters& m_bar) {
    const int64_t j = list.j, b0 = list.b0;
    const Vec3<T> point = Load3(At(args.p, args.batch, b0) + 3 * j);
    const typename M::Parameters m =
        LoadParameters<M>(At(args.sigma, args.batch, b0), M::kR > 0 ? At(args.R, args.batch, b0) : nullptr, j);
    Vec3<T> v_point = {0, 0, 0};
    typename M::Parameters dm = {};
    if constexpr (kSecond) {
      v_point = Load3If(AtIf(args.v_p, args.batch, b0), j);
      dm = LoadTangents<M>(AtIf(args.v_sigma, args.batch, b0), M::kR > 0 ? AtIf(args.v_R, args.batch, b0) : nullptr, j);
    }
    for (int64_t at = list.begin + first * kWarp + lane; at < list.end; at += warps * kWarp) {
      const int32_t n = list.order[at];
      int64_t b, i;
      query_of(list, n, b, i);
      const PairFactors<T> factors = args.factors[(b * args.Q + i) * args.K + n % args.K];
      if (!HasMetricTerms(factors)) continue;
      const Vec3<T> d = Load3(At(args.q, args.batch, b) + 3 * i) - point;
      const Pair<T> c = {factors.dist, factors.exponent};
      if constexpr (kSecond) {
        const Vec3<T> dd = Load3If(AtIf(args.v_q, args.batch, b), i) - v_point;
        Accumulate(d_bar, M::SecondGradient(m, d, dd, dm, factors.a_e, c, m_bar));
      } else {
        Accumulate(d_bar, M::Gradient(m, d, c, m_bar));
      }
    }
  };

  // Lanes are features block..block + kWarp·kWidth − 1: f̄ = Σ factor · ct_f.
  const auto sum_features = [&](const List& list, int first, int warps, int64_t block, T(&sum)[kWidth]) {
    const int64_t feature = block + lane * kWidth;
    for (int64_t start = list.begin + first * kWarp; start < list.end; start += warps * kWarp) {
      const TF* ct_f = nullptr;
      T factor = 0;
      if (start + lane < list.end) {
        const int32_t n = list.order[start + lane];
        int64_t b, i;
        query_of(list, n, b, i);
        factor = args.factors[(b * args.Q + i) * args.K + n % args.K].feature;
        ct_f = At(args.ct_f, args.batch, b) + i * args.F;
      }
      const int count = static_cast<int>(min(int64_t{kWarp}, list.end - start));
#pragma unroll 8
      for (int l = 0; l < count; ++l) {
        const T factor_l = __shfl_sync(kFullMask, factor, l);
        const auto ct_l =
            reinterpret_cast<const TF*>(__shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(ct_f), l));
        if (feature < args.F) {
          T x[kWidth];
          LoadFeatures(ct_l + feature, x);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) sum[e] = Fma(factor_l, x[e], sum[e]);
        }
      }
    }
  };

  // Term e of the metric's gradients: p, sigma, then R.
  const auto store_term = [&](int64_t row, int e, T value) {
    if (e < 3) {
      if (args.p_bar != nullptr) args.p_bar[3 * row + e] = -value;
    } else if (e < 3 + M::kSigma) {
      if (args.sigma_bar != nullptr) args.sigma_bar[M::kSigma * row + e - 3] = value;
    } else if (args.R_bar != nullptr) {
      args.R_bar[M::kR * row + e - 3 - M::kSigma] = value;
    }
  };
  // Adds the lanes' terms up; lane e returns term e.
  const auto sum_terms = [&](const Vec3<T>& d_bar, const typename M::Parameters& m_bar) {
    const T* of_m = reinterpret_cast<const T*>(&m_bar);  // its scalars in a row, sigma first
    const T* of_d = reinterpret_cast<const T*>(&d_bar);
    T mine = 0;
#pragma unroll
    for (int e = 0; e < kTerms; ++e) {
      const T sum = WarpSum(e < 3 ? of_d[e] : of_m[e - 3]);
      mine = lane == e ? sum : mine;
    }
    return mine;
  };

  // Turn −1: each warp for itself. Turns 0 to kPointWarps − 1: all warps together, for the point of that warp.
  const int64_t first_row = int64_t{blockIdx.x} * kPointWarps;
  for (int turn = -1; turn < kPointWarps; ++turn) {
    const bool together = turn >= 0;
    if (together && !is_long[turn]) continue;
    const int64_t row = first_row + (together ? turn : warp);
    List list = {};
    if (row < rows) list = list_of(row);
    if (!together) {
      const bool leave = list.end - list.begin > kLong;
      if (lane == 0) is_long[warp] = leave;
      __syncthreads();
      if (leave || row >= rows) continue;
    }
    const int first = together ? warp : 0, warps = together ? kPointWarps : 1;

    if (geometry) {
      Vec3<T> d_bar = {0, 0, 0};
      typename M::Parameters m_bar = {};
      sum_geometry(list, first, warps, d_bar, m_bar);
      T term = sum_terms(d_bar, m_bar);
      if (together) {
        if (lane < kTerms) partial[warp][lane] = term;
        __syncthreads();
        term = 0;
        for (int w = 0; w < kPointWarps && lane < kTerms; ++w) term += partial[w][lane];
        __syncthreads();
      }
      if (first == 0 && lane < kTerms) store_term(row, lane, term);
    }
    for (int64_t block = 0; block < args.F && args.f_bar != nullptr; block += kWarp * kWidth) {
      T sum[kWidth] = {};
      if (args.ct_f.data != nullptr) sum_features(list, first, warps, block, sum);
      if (together) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) partial[warp][lane * kWidth + e] = sum[e];
        __syncthreads();
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          sum[e] = 0;
          for (int w = 0; w < kPointWarps; ++w) sum[e] += partial[w][lane * kWidth + e];
        }
        __syncthreads();
      }
      const int64_t feature = block + lane * kWidth;
      if (first == 0 && feature < args.F) StoreFeatures(sum, args.f_bar + row * args.F + feature);
    }
  }
}

template <class M, class T, class TF, Order kOrder, int kWidth>
cudaError_t Launch(const Aggregate<T, TF>& args, cudaStream_t stream) {
  const int64_t rows = Count(args.batch) * args.Q, blocks = CeilDiv(rows, kWarps);
  if (cudaError_t error = CheckGrid(blocks); error != cudaSuccess) return error;
  if (blocks > 0) {
    QueryKernel<M, T, TF, kOrder, kWidth><<<static_cast<unsigned>(blocks), kWarps * kWarp, 0, stream>>>(args, rows);
    if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if constexpr (kOrder != Order::kZeroth) {
    const int64_t points = Count(args.kept) * args.P, point_blocks = CeilDiv(points, kPointWarps);
    if (cudaError_t error = CheckGrid(point_blocks); error != cudaSuccess) return error;
    if (WantsPoints(args) && point_blocks > 0) {
      PointKernel<M, T, TF, kOrder == Order::kSecond, kWidth>
          <<<static_cast<unsigned>(point_blocks), kPointWarps * kWarp, 0, stream>>>(args, Split(args.batch, args.kept),
                                                                                    points);
      return cudaGetLastError();
    }
  }
  return cudaSuccess;
}

template <class M, class T, class TF, int kWidth>
cudaError_t LaunchRole(const Aggregate<T, TF>& args, AggregateRole role, cudaStream_t stream) {
  switch (role) {
    case AggregateRole::kValue:
      return Launch<M, T, TF, Order::kZeroth, kWidth>(args, stream);
    case AggregateRole::kVjp:
      return Launch<M, T, TF, Order::kFirst, kWidth>(args, stream);
    default:  // forward mode is what vjp_vjp says of the cotangents
      return Launch<M, T, TF, Order::kSecond, kWidth>(args, stream);
  }
}

template <class M, class T, class TF>
cudaError_t LaunchWidth(const Aggregate<T, TF>& args, AggregateRole role, cudaStream_t stream) {
  return args.F % (2 * kWarp) == 0 ? LaunchRole<M, T, TF, 2>(args, role, stream)
                                   : LaunchRole<M, T, TF, 1>(args, role, stream);
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

template <class T, class TF>
cudaError_t LaunchAggregate(const Aggregate<T, TF>& args, MetricKind metric, AggregateRole role, cudaStream_t stream) {
  return metric == MetricKind::kAnisotropic ? KNN_ISA::LaunchWidth<KNN_ISA::Anisotropic<T>>(args, role, stream)
                                            : KNN_ISA::LaunchWidth<KNN_ISA::Isotropic<T>>(args, role, stream);
}

template cudaError_t LaunchAggregate(const Aggregate<float, float>&, MetricKind, AggregateRole, cudaStream_t);
template cudaError_t LaunchAggregate(const Aggregate<double, double>&, MetricKind, AggregateRole, cudaStream_t);
template cudaError_t LaunchAggregate(const Aggregate<float, BFloat16>&, MetricKind, AggregateRole, cudaStream_t);
template cudaError_t LaunchAggregate(const Aggregate<float, Half>&, MetricKind, AggregateRole, cudaStream_t);

}  // namespace knn
