// The aggregate op and its derivatives on CUDA, without atomics: every sum is taken in a fixed order, so results have
// the same bits from run to run.
//
// A team of 16 lanes per query does what belongs to queries. Its lanes are now pairs (one neighbour each, for distances
// and metrics), now words of one neighbour's parameters or features (for loads that meet few cache lines). Where
// gradients of points are wanted it leaves four factors a pair behind, or six. The pairs, in the order that invert()
// fixed, are then cut into pieces of one size, whatever the lengths of the points' lists. A warp per piece sums over
// each point in it, and a last kernel adds up the points that more than one piece has seen.

#include <cuda_pipeline_primitives.h>

#include "common/cuda.cuh"
#include "knn/aggregate/cuda.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kTeam = 16;       // lanes that share a query, or a row of features
constexpr int kTeams = 8;       // of a block of queries
constexpr int kPieceWarps = 4;  // of a block of pieces
constexpr int kJoinWarps = 8;   // of a block of points
constexpr int kRows = 4;        // rows of features that a team has in flight

// kWidth neighbouring features, as they are stored. All that can be under way at once is loaded before any is widened.
template <class TF, int kWidth>
struct alignas(sizeof(TF) * kWidth) Packet {
  TF value[kWidth];
};
template <int kWidth, class TF>
__device__ __forceinline__ Packet<TF, kWidth> LoadFeatures(const TF* row) {
  return *reinterpret_cast<const Packet<TF, kWidth>*>(row);
}

template <class T, class TF, int kWidth, int kCount>
__device__ __forceinline__ void WidenFeatures(const Packet<TF, kWidth> (&in)[kCount], Stored stored,
                                              T (&out)[kCount][kWidth]) {
  const auto each = [&](auto widen) {
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) out[r][e] = widen(in[r].value[e]);
    }
  };
  if constexpr (std::is_same_v<T, TF>) {
    each([](T x) { return x; });
  } else if (stored == Stored::bfloat16) {  // one branch for all of them
    each([](TF x) { return Widen(BFloat16{x.bits}); });
  } else {
    each([](TF x) { return Widen(Half{x.bits}); });
  }
}

template <int kWidth, class T, class TF>
__device__ __forceinline__ void StoreFeatures(const T (&in)[kWidth], Stored stored, TF* row) {
  Packet<TF, kWidth> packet;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) Narrow(in[e], stored, &packet.value[e]);
  *reinterpret_cast<Packet<TF, kWidth>*>(row) = packet;
}

// Tangents of a point's parameters, zero where there are none.
template <class M, class T>
__device__ __forceinline__ typename M::Parameters LoadTangents(const T* sigma, const T* R, int64_t j) {
  return M::LoadTangents(sigma == nullptr ? nullptr : sigma + M::kSigma * j, R == nullptr ? nullptr : R + M::kR * j);
}

template <class T>
__device__ __forceinline__ Vec3<T> Load3If(const T* a, int64_t i) {
  return a == nullptr ? Vec3<T>{0, 0, 0} : Load3(a + 3 * i);
}

// Sums over a team, of as many values as it has lanes: lane l returns that of part[l]. Each step hands half of the sums
// to the lane's partner, 15 shuffles for 16 sums instead of 64.
template <int kSums, class T>
__device__ __forceinline__ T TeamSums(const T (&part)[kSums]) {
  if constexpr (kSums == 1) {
    return part[0];
  } else {
    constexpr int kHalf = kSums / 2;
    const bool high = (threadIdx.x & kHalf) != 0;
    T rest[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const T a = part[i], b = part[i + kHalf];
      rest[i] = (high ? b : a) + __shfl_xor_sync(kFullMask, high ? a : b, kHalf);
    }
    return TeamSums(rest);
  }
}

// Rows of features for the first `count` pairs that a team's lanes hold. dots[n] of lane l grows by ⟨g[n], row j⟩ of
// its own j, for n < kDots, and `sum` by Σ c · (row j) over the team. Both are over the team's features alone, of which
// the lane's begin at `feature`. Pairs with j < 0 add nothing.
template <int kDots, bool kSum, int kWidth, class T, class TF>
__device__ __forceinline__ void VisitRows(const TF* f, int F, int feature, int32_t j, int count, T c,
                                          const T (*g)[kWidth], Stored stored, T* dots, T (&sum)[kWidth]) {
  const bool inside = feature < F;
  if (inside) f += feature;
  T dot[kDots > 0 ? kDots : 1][kTeam] = {};
#pragma unroll
  for (int group = 0; group < kTeam; group += kRows) {
    if (group < count) {
      Packet<TF, kWidth> packets[kRows];
      bool adds[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        // Pairs and lanes that have nothing to load load something else: a load under a condition waits for the last.
        const int32_t row = __shfl_sync(kFullMask, j, group + r, kTeam);
        packets[r] = LoadFeatures<kWidth>(f + int64_t{max(row, 0)} * F);
        adds[r] = inside && row >= 0;
      }
      T x[kRows][kWidth];
      WidenFeatures(packets, stored, x);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) x[r][e] = adds[r] ? x[r][e] : T(0);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const T c_row = kSum ? __shfl_sync(kFullMask, c, group + r, kTeam) : T(0);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
#pragma unroll
          for (int n = 0; n < kDots; ++n) dot[n][group + r] = Fma(g[n][e], x[r][e], dot[n][group + r]);
          if (kSum) sum[e] = Fma(c_row, x[r][e], sum[e]);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kDots; ++n) dots[n] += TeamSums(dot[n]);
}

template <class T>
__device__ __forceinline__ T TeamSum(T x) {
#pragma unroll
  for (int step = kTeam / 2; step > 0; step /= 2) x += __shfl_xor_sync(kFullMask, x, step);
  return x;
}

enum class Order { kZeroth, kFirst, kSecond, kMoving };  // kMoving: second, where cotangents move too
template <Order kOrder>
constexpr bool kIsSecond = kOrder == Order::kSecond || kOrder == Order::kMoving;

// Blocks of a multiprocessor that registers must suffice for: what hides the most latency, as measured on an H200 at
// F = 64. A few registers are spilled for it.
template <class T, Order kOrder>
constexpr int kQueryBlocks = sizeof(T) == 8             ? 1
                             : kOrder == Order::kZeroth ? 8
                             : kOrder == Order::kFirst  ? 7
                             : kOrder == Order::kSecond ? 6
                                                        : 5;
template <class T>
constexpr int kPieceBlocks = sizeof(T) == 8 ? 1 : 6;

// The half that owns queries. Zeroth order writes f_out, w_out, dists. Second order writes their tangents there, which
// are the gradients in the cotangents as well, unless these move.
template <class M, class T, class TF, Order kOrder, int kWidth>
__global__ void __launch_bounds__(kTeams* kTeam, kQueryBlocks<T, kOrder>)
    QueryKernel(const Aggregate<T, TF> args, uint32_t rows) {
  constexpr bool kSecond = kIsSecond<kOrder>, kMoving = kOrder == Order::kMoving, kGradients = kOrder != Order::kZeroth;
  constexpr bool kSums = kOrder == Order::kZeroth || kOrder == Order::kSecond;  // results that are sums of rows
  using Factors = FactorsOf<T, kMoving>;
  constexpr int kWords = 3 + M::kSigma + M::kR, kSpan = kTeam * kWidth;
  static_assert(kWords <= kTeam);
  __shared__ T fetched[kTeams][kTeam][kWords | 1];  // p, sigma, R of each lane's neighbour; odd, against bank conflicts
  const int lane = threadIdx.x % kTeam, team = threadIdx.x / kTeam;
  // A query over the whole batch. A team that is left over repeats the last one, so that warps stay together.
  const uint32_t row = min(blockIdx.x * kTeams + team, rows - 1), Q = static_cast<uint32_t>(args.Q);
  const uint32_t b = row / Q, i = row - b * Q;
  const int K = static_cast<int>(args.K), F = static_cast<int>(args.F);
  const TF* f = At(args.f, args.batch, b);
  const int32_t* idxs = At(args.idxs, args.batch, b) + int64_t{i} * K;
  const Vec3<T> query = Load3(At(args.q, args.batch, b) + 3 * int64_t{i});

  const TF* ct_f = kGradients ? AtOrNull(args.ct_f, args.batch, b) : nullptr;
  if (ct_f != nullptr) ct_f += int64_t{i} * F;
  const TF* v_ct_f = kMoving ? AtOrNull(args.v_ct_f, args.batch, b) : nullptr;
  if (v_ct_f != nullptr) v_ct_f += int64_t{i} * F;

  // The word of a neighbour that this lane fetches for the lane that the neighbour belongs to.
  const T* word = At(args.p, args.batch, b) + lane;
  int stride = 3;
  if (lane >= 3) {
    word = At(args.sigma, args.batch, b) + (lane - 3);
    stride = M::kSigma;
  }
  if (M::kR > 0 && lane >= 3 + M::kSigma) {
    word = At(args.R, args.batch, b) + (lane - 3 - M::kSigma);
    stride = M::kR;
  }

  // Lanes are pairs: the lane's neighbour among those from `start`, its weight and tangent. j < 0 where there is none.
  int32_t j = -1;
  T w = 0;
  Pair<T> value = {0, 0}, tangent = {0, 0};
  const T* own = fetched[team][lane];
  const auto offset = [&] { return query - Load3(own); };
  const auto parameters = [&] { return M::Load(own + 3, own + 3 + M::kSigma); };
  const auto v_offset = [&] {
    return Load3If(AtOrNull(args.v_q, args.batch, b), i) - Load3If(AtOrNull(args.v_p, args.batch, b), j);
  };
  const auto v_parameters = [&] {
    return LoadTangents<M>(AtOrNull(args.v_sigma, args.batch, b),
                           M::kR > 0 ? AtOrNull(args.v_R, args.batch, b) : nullptr, j);
  };
  const auto fetch = [&](int start) {
    const int32_t given = start + lane < K ? idxs[start + lane] : -1;
    j = Names(given, args.P) ? given : -1;
    __syncwarp();  // the words before have been read
#pragma unroll
    for (int l = 0; l < kTeam; ++l) {
      const int32_t j_l = __shfl_sync(kFullMask, j, l, kTeam);
      if (j_l >= 0 && lane < kWords) {
        __pipeline_memcpy_async(&fetched[team][l][lane], word + int64_t{j_l} * stride, sizeof(T));
      }
    }
    __pipeline_commit();
  };
  const auto weigh = [&] {
    __pipeline_wait_prior(0);
    __syncwarp();
    w = 0;
    tangent = {0, 0};
    if (j < 0) return;
    value = M::Value(parameters(), offset());
    if (value.dist == T(INFINITY)) {
      j = -1;
      return;
    }
    w = Exp(-value.exponent);
    if constexpr (kSecond) tangent = M::Tangent(parameters(), offset(), v_offset(), v_parameters());
  };

  // Rows are visited once, both for ⟨ct_f, row⟩ and for sums over all neighbours, unless there are several blocks of
  // features and several of neighbours: then pass −1 is for the former, and each block has a pass for its sums.
  const bool once = K <= kTeam || F <= kSpan;
  const bool dots = kGradients && ct_f != nullptr, gradients = args.q_bar != nullptr || args.factors != nullptr;
  const int sum_blocks = !kSums || once || args.f_out == nullptr ? 0 : (F + kSpan - 1) / kSpan;
  Vec3<T> q_bar = {0, 0, 0};
  for (int pass = once || kGradients ? -1 : 0; pass < sum_blocks; ++pass) {
    const bool sums = kSums && args.f_out != nullptr && (once || pass >= 0);
    const bool main = pass < 0 || (!kGradients && pass == 0);
    const int first = pass < 0 ? 0 : pass * kSpan, last = pass < 0 ? F : min(F, first + kSpan);
    T sum[kWidth] = {};
    for (int start = 0; start < max(K, 1); start += kTeam) {  // once if K is 0, for zeros in f_out
      fetch(start);
      if (kSums) weigh();
      const int count = min(kTeam, K - start), present = args.P > 0 ? count : 0, k = start + lane;
      if (kSums && main && lane < count) {
        if (args.w_out != nullptr) args.w_out[int64_t{row} * K + k] = kSecond ? -w * tangent.exponent : w;
        if (args.dists != nullptr) {
          args.dists[int64_t{row} * K + k] = kSecond ? tangent.dist : j < 0 ? T(INFINITY) : value.dist;
        }
      }

      // Σ_k w f, or Σ_k w (v_f − s_e f), with one rounding at the end for 16-bit features. With b = ⟨ct_f, f⟩ and
      // a = ⟨ct_f, v_f⟩ + ⟨v_ct_f, f⟩ of each pair.
      T b_a[2] = {0, 0};
      for (int block = first; block < last && (sums || dots); block += kSpan) {
        const int at = block + lane * kWidth;
        Packet<TF, kWidth> cotangents[2] = {};
        if (dots && at < F) cotangents[0] = LoadFeatures<kWidth>(ct_f + at);
        if (v_ct_f != nullptr && at < F) cotangents[1] = LoadFeatures<kWidth>(v_ct_f + at);
        T g[2][kWidth];
        WidenFeatures(cotangents, args.stored, g);
        const T c = kSecond ? -w * tangent.exponent : w;
        VisitRows<kMoving ? 2 : kGradients ? 1 : 0, kSums>(f, F, at, j, present, c, g, args.stored, b_a, sum);
        if (kSecond && args.v_f.data != nullptr) {
          VisitRows<1, kSums>(At(args.v_f, args.batch, b), F, at, j, present, w, g, args.stored, b_a + 1, sum);
        }
        if (sums && start + kTeam >= K) {
          if (at < F) StoreFeatures(sum, args.stored, args.f_out + int64_t{row} * F + at);
#pragma unroll
          for (int e = 0; e < kWidth; ++e) sum[e] = 0;
        }
      }
      if (!kSums) weigh();  // so late, since the rows need no weights and hide the wait for parameters
      if (!kGradients || !main || !gradients) continue;

      Factors factors = {NoFactors<T>()};
      if (j >= 0) {
        const auto of_pair = [&](const Operand<const T>& ct) {
          return ct.data == nullptr ? T(0) : At(ct, args.batch, b)[int64_t{i} * K + k];
        };
        const T ct_w_pair = of_pair(args.ct_w), ct_d_pair = of_pair(args.ct_d);
        if constexpr (kMoving) {
          const T a = b_a[1] + of_pair(args.v_ct_w);
          factors = {SecondOrderFactors(w, b_a[0], ct_w_pair, ct_d_pair, a, tangent.exponent), w, of_pair(args.v_ct_d)};
        } else {
          factors = kSecond ? SecondOrderFactors(w, b_a[0], ct_w_pair, ct_d_pair, b_a[1], tangent.exponent)
                            : FirstOrderFactors(w, b_a[0], ct_w_pair, ct_d_pair);
        }
      }
      if (args.factors != nullptr && lane < count) {
        static_cast<Factors*>(args.factors)[int64_t{row} * K + k] = factors;
      }
      __syncwarp();  // parameters are read again, instead of kept in registers meanwhile
      if (args.q_bar != nullptr && j >= 0) {
        typename M::Parameters unused = {};
        Accumulate(q_bar,
                   kSecond ? SecondOrderGradient<M>(parameters(), offset(), v_offset(), v_parameters(), factors, unused)
                           : M::Gradient(parameters(), offset(), {factors.dist, factors.exponent}, unused));
      }
    }
  }

  if (kGradients && args.q_bar != nullptr) {
    const Vec3<T> sum = {TeamSum(q_bar.x), TeamSum(q_bar.y), TeamSum(q_bar.z)};
    if (lane < 3) args.q_bar[3 * int64_t{row} + lane] = lane == 0 ? sum.x : lane == 1 ? sum.y : sum.z;
  }
}

template <class T, class TF>
__device__ __forceinline__ bool WantsGeometry(const Aggregate<T, TF>& args) {
  return args.p_bar != nullptr || args.sigma_bar != nullptr || args.R_bar != nullptr;
}

// Term e of the metric's gradients of a point: p, sigma, then R.
template <class M, class T, class TF>
__device__ __forceinline__ void StoreTerm(const Aggregate<T, TF>& args, int64_t row, int e, T value) {
  if (e < 3) {
    if (args.p_bar != nullptr) args.p_bar[3 * row + e] = -value;
  } else if (e < 3 + M::kSigma) {
    if (args.sigma_bar != nullptr) args.sigma_bar[M::kSigma * row + e - 3] = value;
  } else if (args.R_bar != nullptr) {
    args.R_bar[M::kR * row + e - 3 - M::kSigma] = value;
  }
}

// The half that owns points: their gradients, summed over the pairs of one piece. A point's sum is a result if the
// piece has all of its pairs. Else it goes to the piece's first or second place in args.pieces: first, if the point has
// pairs in the piece before. At most one point is of each kind.
template <class M, class T, class TF, Order kOrder, int kWidth>
__global__ void __launch_bounds__(kPieceWarps* kWarp, kPieceBlocks<T>)
    PieceKernel(const Aggregate<T, TF> args, const __grid_constant__ SplitBatch split, uint32_t pieces,
                uint32_t all_pieces) {
  constexpr int kTerms = 3 + M::kSigma + M::kR, kSpan = kTeam * kWidth;
  static_assert(kTerms <= kTeam && kPieceTerms == kTeam);
  constexpr bool kMoving = kOrder == Order::kMoving;
  constexpr int kCotangents = kMoving ? 2 : 1;  // rows of a query: ct_f, v_ct_f
  using Factors = FactorsOf<T, kMoving>;
  struct Row {
    const TF* ct_f[kCotangents];
    T factor[kCotangents];
  };
  __shared__ Row shared_rows[kPieceWarps][kWarp];
  __shared__ T shared_terms[kPieceWarps][kWarp][kTerms | 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = lane % kTeam, half = lane / kTeam;
  auto& rows = shared_rows[warp];
  auto& terms = shared_terms[warp];
  const uint32_t piece = blockIdx.x * kPieceWarps + warp;
  if (piece >= all_pieces) return;
  const int64_t c = piece / pieces;
  // What belongs to points does not vary along summed axes: their entry 0 serves.
  const int64_t b0 = Join(split, c, 0);
  const int32_t* order = At(args.order, args.batch, b0);
  const int32_t* offsets = At(args.offsets, args.batch, b0);
  const int64_t begin = int64_t{piece % pieces} * kPiecePairs, end = min(begin + kPiecePairs, int64_t{offsets[args.P]});
  const uint32_t K = static_cast<uint32_t>(args.K), Q = static_cast<uint32_t>(args.Q);

  for (int64_t block = 0; block == 0 || (args.f_bar != nullptr && block < args.F); block += kSpan) {
    const bool geometry = block == 0 && WantsGeometry(args);
    const int64_t feature = block + column * kWidth;
    const bool inside = args.f_bar != nullptr && feature < args.F;
    const bool features = args.f_bar != nullptr && args.ct_f.data != nullptr && args.F > 0;
    const bool v_features = kMoving && args.f_bar != nullptr && args.v_ct_f.data != nullptr && args.F > 0;
    // Of `point`: lanes are features of every other pair, and terms of the metric's gradients.
    int32_t point = -1;
    T sum[kWidth] = {}, term = 0;
    const auto finish = [&] {
      if (point < 0) return;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) sum[e] += __shfl_xor_sync(kFullMask, sum[e], kTeam);
      term += __shfl_xor_sync(kFullMask, term, kTeam);
      const bool from_before = offsets[point] < begin;
      if (half == 1) return;
      if (!from_before && offsets[point + 1] <= end) {
        const int64_t row = c * args.P + point;
        if (inside) StoreFeatures(sum, args.stored, args.f_bar + row * args.F + feature);
        if (geometry && column < kTerms) StoreTerm<M>(args, row, column, term);
      } else {
        T* place = args.pieces + (2 * int64_t{piece} + (from_before ? 0 : 1)) * (args.F + kPieceTerms);
        if (inside) StoreFeatures(sum, Stored::whole, place + feature);
        if (geometry) place[args.F + column] = term;
      }
    };

    for (int64_t start = begin; start < end; start += kWarp) {
      // Lanes are pairs.
      int32_t j = -1;
      __syncwarp();  // rows and terms before have been read
      if (start + lane < end) {
        const uint32_t n = static_cast<uint32_t>(order[start + lane]), in_all = n / K, s = in_all / Q;
        const int64_t b = s == 0 ? b0 : Join(split, c, s), i = in_all - s * Q;
        const int64_t slot = i * args.K + (n - in_all * K);
        const Factors factors = static_cast<const Factors*>(args.factors)[b * args.Q * args.K + slot];
        j = At(args.idxs, args.batch, b)[slot];
        const auto of_query = [&](const Operand<const TF>& ct_f) {
          return ct_f.data == nullptr ? nullptr : At(ct_f, args.batch, b) + i * args.F;
        };
        if constexpr (kMoving) {
          rows[lane] = {{of_query(args.ct_f), of_query(args.v_ct_f)}, {factors.feature, factors.moving_feature}};
        } else {
          rows[lane] = {{of_query(args.ct_f)}, {factors.feature}};
        }
        if (geometry) {
          Vec3<T> d_bar = {0, 0, 0};
          typename M::Parameters m_bar = {};
          if (Adds(factors.feature)) {
            const T* R = M::kR > 0 ? At(args.R, args.batch, b0) + M::kR * int64_t{j} : nullptr;
            const auto m = M::Load(At(args.sigma, args.batch, b0) + M::kSigma * int64_t{j}, R);
            const Vec3<T> d =
                Load3(At(args.q, args.batch, b) + 3 * i) - Load3(At(args.p, args.batch, b0) + 3 * int64_t{j});
            if constexpr (kIsSecond<kOrder>) {
              const Vec3<T> dd =
                  Load3If(AtOrNull(args.v_q, args.batch, b), i) - Load3If(AtOrNull(args.v_p, args.batch, b0), j);
              const auto dm = LoadTangents<M>(AtOrNull(args.v_sigma, args.batch, b0),
                                              M::kR > 0 ? AtOrNull(args.v_R, args.batch, b0) : nullptr, j);
              d_bar = SecondOrderGradient<M>(m, d, dd, dm, factors, m_bar);
            } else {
              d_bar = M::Gradient(m, d, {factors.dist, factors.exponent}, m_bar);
            }
          }
          const T* of_d = reinterpret_cast<const T*>(&d_bar);
          const T* of_m = reinterpret_cast<const T*>(&m_bar);  // its scalars in a row, sigma first
#pragma unroll
          for (int e = 0; e < kTerms; ++e) terms[lane][e] = e < 3 ? of_d[e] : of_m[e - 3];
        }
      }
      __syncwarp();

      // Runs of one point. The halves of the warp take turns with its pairs.
      const int count = static_cast<int>(min(int64_t{kWarp}, end - start));
      for (int first = 0, last; first < count; first = last) {
        const int32_t next = __shfl_sync(kFullMask, j, first);
        last = first + __popc(__ballot_sync(kFullMask, j == next));
        if (next != point) {
          finish();
          point = next;
          term = 0;
#pragma unroll
          for (int e = 0; e < kWidth; ++e) sum[e] = 0;
        }
        for (int l = first + half; l - half < last; l += 2 * kRows) {
#pragma unroll
          for (int n = 0; n < kCotangents; ++n) {
            if (!(n == 0 ? features : v_features)) continue;
            Packet<TF, kWidth> packets[kRows];
            T factor[kRows];
            bool adds[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {  // all at once, even if some are beyond the last
              const Row row = rows[min(l + 2 * r, last - 1)];
              packets[r] = LoadFeatures<kWidth>(row.ct_f[n] + (inside ? feature : 0));
              factor[r] = row.factor[n];
              adds[r] = l + 2 * r < last && Adds(row.factor[0]);
            }
            T x[kRows][kWidth];
            WidenFeatures(packets, args.stored, x);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
              for (int e = 0; e < kWidth; ++e) sum[e] = Fma(factor[r], adds[r] ? x[r][e] : T(0), sum[e]);
            }
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (geometry && l + 2 * r < last && column < kTerms) term += terms[l + 2 * r][column];
          }
        }
      }
    }
    finish();
  }
}

// Adds up what pieces have left of points whose pairs lie in several, in their order, and writes the zeros of points
// without pairs. A warp takes a point; then the whole block those of its points that have many pieces. Its points are
// far apart, since long lists often are neighbours.
template <class M, class T, class TF, int kWidth>
__global__ void __launch_bounds__(kJoinWarps* kWarp)
    JoinKernel(const Aggregate<T, TF> args, int64_t pieces, uint32_t points) {
  constexpr int kTerms = 3 + M::kSigma + M::kR, kLong = 32;
  __shared__ alignas(sizeof(T) * kWidth) T partial[kJoinWarps][kWarp * kWidth];
  __shared__ bool is_long[kJoinWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, F = static_cast<int>(args.F);
  const int first_column = args.f_bar != nullptr ? 0 : F, last_column = WantsGeometry(args) ? F + kTerms : F;

  int turns = 0;
  for (int turn = -1; turn < turns; ++turn) {  // −1: each warp for itself
    const bool together = turn >= 0;
    if (together && !is_long[turn]) continue;
    const uint32_t row = blockIdx.x + (together ? turn : warp) * gridDim.x;
    int64_t first_piece = 0;
    int count = 1;  // a point in one piece is done
    if (row < points) {
      const uint32_t P = static_cast<uint32_t>(args.P), c = row / P;
      const int32_t* offsets = At(args.offsets, args.kept, c) + row % P;
      const int32_t begin = offsets[0], end = offsets[1], piece = begin / kPiecePairs;
      first_piece = c * pieces + piece;
      count = begin == end ? 0 : (end - 1) / kPiecePairs - piece + 1;
    }
    if (!together) {
      if (lane == 0) is_long[warp] = count > kLong;
      if (__syncthreads_or(count > kLong)) turns = kJoinWarps;
      if (count > kLong) continue;
    }
    if (count == 1) continue;
    const int first = together ? count * warp / kJoinWarps : 0;
    const int last = together ? count * (warp + 1) / kJoinWarps : count;
    const T* places = args.pieces + 2 * first_piece * (F + kPieceTerms);
    for (int block = first_column; block < last_column; block += kWarp * kWidth) {
      const int column = block + lane * kWidth;
      T sum[kWidth] = {};
      for (int t = first; t < last && column < last_column; t += kRows) {
        Packet<T, kWidth> packets[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {  // all at once, even if some are beyond the last
          const int of = min(t + r, last - 1), place = 2 * of + (of == 0);  // the second place of the first piece
          packets[r] = LoadFeatures<kWidth>(places + int64_t{place} * (F + kPieceTerms) + column);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) sum[e] += t + r < last ? packets[r].value[e] : T(0);
        }
      }
      if (together) {
        StoreFeatures(sum, Stored::whole, &partial[warp][lane * kWidth]);
        __syncthreads();
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          sum[e] = 0;
          for (int w = 0; w < kJoinWarps; ++w) sum[e] += partial[w][lane * kWidth + e];
        }
        __syncthreads();
        if (warp > 0) continue;
      }
      if (column < F) {
        StoreFeatures(sum, args.stored, args.f_bar + int64_t{row} * F + column);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          if (column + e < last_column) StoreTerm<M>(args, row, column + e - F, sum[e]);
        }
      }
    }
  }
}

template <class M, class T, class TF, Order kOrder, int kWidth>
cudaError_t Launch(const Aggregate<T, TF>& args, cudaStream_t stream) {
  const int64_t rows = Count(args.batch) * args.Q;
  if (cudaError_t error = CheckGrid(rows); error != cudaSuccess) return error;
  if (rows > 0) {
    QueryKernel<M, T, TF, kOrder, kWidth><<<static_cast<unsigned>(CeilDiv(rows, kTeams)), kTeams * kTeam, 0, stream>>>(
        args, static_cast<uint32_t>(rows));
    if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  if constexpr (kOrder != Order::kZeroth) {
    const int64_t entries = Count(args.kept), points = entries * args.P;
    if (!WantsPoints(args) || points == 0) return cudaSuccess;
    const int64_t pieces = CeilDiv(rows / entries * args.K, kPiecePairs), all_pieces = entries * pieces;
    if (cudaError_t error = CheckGrid(points + all_pieces); error != cudaSuccess) return error;
    if (all_pieces > 0) {
      const SplitBatch split = Split(args.batch, args.kept);
      PieceKernel<M, T, TF, kOrder, kWidth>
          <<<static_cast<unsigned>(CeilDiv(all_pieces, kPieceWarps)), kPieceWarps * kWarp, 0, stream>>>(
              args, split, static_cast<uint32_t>(pieces), static_cast<uint32_t>(all_pieces));
      if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
    }
    JoinKernel<M, T, TF, kWidth><<<static_cast<unsigned>(CeilDiv(points, kJoinWarps)), kJoinWarps * kWarp, 0, stream>>>(
        args, pieces, static_cast<uint32_t>(points));
  }
  return cudaGetLastError();
}

template <class M, class T, class TF, int kWidth>
cudaError_t LaunchRole(const Aggregate<T, TF>& args, AggregateRole role, cudaStream_t stream) {
  switch (role) {
    case AggregateRole::kValue:
      return Launch<M, T, TF, Order::kZeroth, kWidth>(args, stream);
    case AggregateRole::kVjp:
      return Launch<M, T, TF, Order::kFirst, kWidth>(args, stream);
    case AggregateRole::kVjpJvp:
      return Launch<M, T, TF, Order::kMoving, kWidth>(args, stream);
    default:  // forward mode is what vjp_vjp says of the cotangents
      return Launch<M, T, TF, Order::kSecond, kWidth>(args, stream);
  }
}

template <class M, class T, class TF>
cudaError_t LaunchWidth(const Aggregate<T, TF>& args, AggregateRole role, cudaStream_t stream) {
  return args.F % 4 == 0 ? LaunchRole<M, T, TF, 4>(args, role, stream) : LaunchRole<M, T, TF, 1>(args, role, stream);
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
template cudaError_t LaunchAggregate(const Aggregate<float, Float16>&, MetricKind, AggregateRole, cudaStream_t);

}  // namespace knn
