// The aggregate op and its derivatives on CPUs.
//
// Phase 1 goes through queries and writes what belongs to them, and the factors of each pair where phase 2 wants them.
// Phase 2 goes through points and sums over the pairs that name the point, in the order of the pair's number: results
// do not depend on how many threads there are.

#include "aggregate/cpu.h"

#include "common/simd.h"

namespace knn::KNN_ISA {
namespace {

constexpr int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int kBlock = 64;  // pairs looked at together

template <class T>
const T* AtOrNull(const Operand<const T>& operand, const Batch& batch, int64_t b) {
  return operand.data == nullptr ? nullptr : At(operand, batch, b);
}

template <class T>
void Store3(Vec3<T> a, T* out) {
  out[0] = a.x, out[1] = a.y, out[2] = a.z;
}

template <class T, class TF>
KNN_FN Vec<T> LoadWide(const TF* a) {
  if constexpr (sizeof(T) == sizeof(TF)) {
    return Vec<T>::Load(a);
  } else {
    T wide[Vec<T>::kLanes];
    for (int l = 0; l < Vec<T>::kLanes; ++l) wide[l] = Widen(a[l]);
    return Vec<T>::Load(wide);
  }
}

// ⟨a, b⟩.
template <class T, class TF>
KNN_FN T DotRows(const TF* a, const TF* b, int64_t n) {
  using V = Vec<T>;
  V sums[2] = {V::Broadcast(0), V::Broadcast(0)};
  int64_t i = 0;
  for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
    sums[0] = Fma(LoadWide<T>(a + i), LoadWide<T>(b + i), sums[0]);
    sums[1] = Fma(LoadWide<T>(a + i + V::kLanes), LoadWide<T>(b + i + V::kLanes), sums[1]);
  }
  for (; i + V::kLanes <= n; i += V::kLanes) sums[0] = Fma(LoadWide<T>(a + i), LoadWide<T>(b + i), sums[0]);
  T sum = Sum(sums[0] + sums[1]);
  for (; i < n; ++i) sum = Fma(Widen(a[i]), Widen(b[i]), sum);
  return sum;
}

// Rows come in random order: memory has to be asked for them early.
template <class TF>
KNN_FN void Prefetch(const TF* row, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(TF);
  for (int64_t i = 0; i < Min(n, 8 * kLine); i += kLine) __builtin_prefetch(row + i);
}

// Rows of features, and what they are multiplied with.
template <class T, class TF>
struct Rows {
  int n = 0;
  const TF* row[2 * kBlock];
  T factor[2 * kBlock];

  void Add(const TF* r, T f) {
    row[n] = r;
    factor[n++] = f;
  }
};

// A weighted sum of rows, at as many features from `begin` on as fit in registers.
template <class T, class TF>
class RowSum {
  using V = Vec<T>;
  static constexpr int kVectors = V::kLanes >= 16 ? 4 : 8;

 public:
  static constexpr int64_t kFeatures = kVectors * V::kLanes;

  RowSum(int64_t F, int64_t begin) : short_(F < V::kLanes ? F : 0) {
    for (int v = 0; v < kVectors; ++v) {
      // Vectors that would end behind the row are moved to end with it, and compute some sums twice, alike.
      start_[v] = short_ > 0 ? 0 : Min(begin + v * V::kLanes, F - V::kLanes);
      sum_[v] = V::Broadcast(0);
    }
  }

  void Add(const Rows<T, TF>& rows) {
    if (short_ > 0) {
      for (int r = 0; r < rows.n; ++r) {
        for (int l = 0; l < short_; ++l) sum_[0].v[l] = Fma(rows.factor[r], Widen(rows.row[r][l]), sum_[0].v[l]);
      }
      return;
    }
    V sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = sum_[v];
    for (int r = 0; r < rows.n; ++r) {
      const V factor = V::Broadcast(rows.factor[r]);
      for (int v = 0; v < kVectors; ++v) sum[v] = Fma(factor, LoadWide<T>(rows.row[r] + start_[v]), sum[v]);
    }
    for (int v = 0; v < kVectors; ++v) sum_[v] = sum[v];
  }

  void Write(TF* row) const {
    for (int v = 0; v < (short_ > 0 ? 1 : kVectors); ++v) {
      for (int l = 0; l < (short_ > 0 ? short_ : V::kLanes); ++l) Narrow(sum_[v].v[l], row + start_[v] + l);
    }
  }

 private:
  int short_;  // the row's length if it is shorter than a vector, else 0
  int64_t start_[kVectors];
  V sum_[kVectors];
};

template <class T, class TF, template <class> class Metric, AggregateRole role>
struct Aggregator {
  using Args = Aggregate<T, TF>;
  using M = Metric<T>;
  using Parameters = typename M::Parameters;
  static constexpr bool kTangents = role == AggregateRole::kJvp || role == AggregateRole::kVjpVjp;
  static constexpr bool kCotangents = role == AggregateRole::kVjp || role == AggregateRole::kVjpVjp;

  // The operands of one batch entry.
  struct Points {
    const T *p, *sigma, *R, *v_p, *v_sigma, *v_R;
    const TF *f, *v_f;

    Points(const Args& args, const Batch& batch, int64_t b)
        : p(AtOrNull(args.p, batch, b)),
          sigma(AtOrNull(args.sigma, batch, b)),
          R(AtOrNull(args.R, batch, b)),
          v_p(AtOrNull(args.v_p, batch, b)),
          v_sigma(AtOrNull(args.v_sigma, batch, b)),
          v_R(AtOrNull(args.v_R, batch, b)),
          f(AtOrNull(args.f, batch, b)),
          v_f(AtOrNull(args.v_f, batch, b)) {}

    Parameters Load(int64_t j) const { return M::Load(sigma + M::kSigma * j, R + M::kR * j); }
    Parameters LoadTangent(int64_t j) const {
      static constexpr T kZeros[9] = {};
      return M::Load(v_sigma == nullptr ? kZeros : v_sigma + M::kSigma * j, v_R == nullptr ? kZeros : v_R + M::kR * j);
    }
  };
  struct Queries {
    const T *q, *v_q, *ct_w, *ct_d;
    const TF* ct_f;

    Queries() = default;
    Queries(const Args& args, int64_t b)
        : q(AtOrNull(args.q, args.batch, b)),
          v_q(AtOrNull(args.v_q, args.batch, b)),
          ct_w(AtOrNull(args.ct_w, args.batch, b)),
          ct_d(AtOrNull(args.ct_d, args.batch, b)),
          ct_f(AtOrNull(args.ct_f, args.batch, b)) {}
  };

  static Vec3<T> Difference(const T* q, const T* p, int64_t i, int64_t j) {
    const Vec3<T> zero = {0, 0, 0};
    return (q == nullptr ? zero : Load3(q + 3 * i)) - (p == nullptr ? zero : Load3(p + 3 * j));
  }

  // The gradient in d of what a pair adds; adds that in the parameters to m_bar.
  static Vec3<T> Gradient(const Points& points, const Queries& queries, int64_t i, int64_t j, const Parameters& m,
                          const Parameters& dm, const PairFactors<T>& by, Parameters& m_bar) {
    const Vec3<T> d = Difference(queries.q, points.p, i, j);
    if constexpr (kTangents) {
      const Vec3<T> dd = Difference(queries.v_q, points.v_p, i, j);
      return M::SecondGradient(m, d, dd, dm, by.a_e, {by.dist, by.exponent}, m_bar);
    } else {
      return M::Gradient(m, d, {by.dist, by.exponent}, m_bar);
    }
  }

  // Phase 1.

  static constexpr int64_t kQueriesPerTask = 64;
  static int64_t QueryTasks(const Args& args) { return Count(args.batch) * Ceil(args.Q, kQueriesPerTask); }

  // Does neighbours [begin, end) of query i in batch entry b, and gathers the rows that they add to f_out.
  static void Pairs(const Args& args, int64_t b, const Points& points, const Queries& queries, const int32_t* idxs,
                    int64_t i, int64_t begin, int64_t end, Rows<T, TF>& rows, Vec3<T>& q_bar) {
    const bool geometry =
        args.q_bar != nullptr || args.p_bar != nullptr || args.sigma_bar != nullptr || args.R_bar != nullptr;
    rows.n = 0;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t j = idxs[i * args.K + k];
      if (j >= 0 && j < args.P) Prefetch(points.f + j * args.F, args.F);
    }
    for (int64_t k = begin; k < end; ++k) {
      const int64_t j = idxs[i * args.K + k], slot = i * args.K + k, at = b * args.Q * args.K + slot;
      Pair<T> value = {0, 0};  // D and e, or their tangents
      T w = 0, w_value = 0;
      PairFactors<T> factors = {0, 0, 0, 0};
      bool exists = j >= 0 && j < args.P;
      Parameters m = {};
      Vec3<T> d = {0, 0, 0};
      if (exists) {
        m = points.Load(j);
        d = Difference(queries.q, points.p, i, j);
        value = M::Value(m, d);
        if (role != AggregateRole::kValue && value.dist == static_cast<T>(HUGE_VAL)) {
          exists = false;
          value = {0, 0};
        }
      }
      if (exists) {
        w = w_value = Exp(-value.exponent);
        Parameters dm = {};
        if constexpr (kTangents) {
          dm = points.LoadTangent(j);
          value = M::Tangent(m, d, Difference(queries.v_q, points.v_p, i, j), dm);
          w_value = -w * value.exponent;
        }
        if constexpr (kCotangents) {
          const T ct_w = queries.ct_w == nullptr ? 0 : queries.ct_w[slot];
          const T ct_d = queries.ct_d == nullptr ? 0 : queries.ct_d[slot];
          const auto dot = [&](const TF* f) -> T {
            if (!geometry || queries.ct_f == nullptr || f == nullptr) return 0;
            return DotRows<T>(queries.ct_f + i * args.F, f + j * args.F, args.F);
          };
          if constexpr (role == AggregateRole::kVjp) {
            factors = FirstOrderFactors(w, dot(points.f), ct_w, ct_d);
          } else {
            factors = SecondOrderFactors(w, dot(points.f), ct_w, ct_d, dot(points.v_f), value.exponent);
          }
          if (args.q_bar != nullptr && HasMetricTerms(factors)) {
            Parameters unused = {};
            Accumulate(q_bar, Gradient(points, queries, i, j, m, dm, factors, unused));
          }
        }
        rows.Add(points.f + j * args.F, w_value);
        if (kTangents && points.v_f != nullptr) rows.Add(points.v_f + j * args.F, w);
      }
      if (args.w_out != nullptr) args.w_out[at] = w_value;
      if (args.dists != nullptr) {
        args.dists[at] = exists || role != AggregateRole::kValue ? value.dist : static_cast<T>(HUGE_VAL);
      }
      if (kCotangents && WantsPoints(args)) args.factors[at] = factors;
    }
  }

  static void DoQueries(const Args& args, void* /*scratch*/, int64_t task) {
    const int64_t tasks = Ceil(args.Q, kQueriesPerTask), b = task / tasks;
    const int64_t begin = task % tasks * kQueriesPerTask, end = Min(begin + kQueriesPerTask, args.Q);
    const Points points(args, args.batch, b);
    const Queries queries(args, b);
    const int32_t* idxs = At(args.idxs, args.batch, b);
    const int64_t F = args.f_out == nullptr ? 0 : args.F;
    Rows<T, TF> rows;
    for (int64_t i = begin; i < end; ++i) {
      Vec3<T> q_bar = {0, 0, 0};
      for (int64_t at = 0; at == 0 || at < F; at += RowSum<T, TF>::kFeatures) {
        RowSum<T, TF> sum(F, at);
        for (int64_t k = 0; k < args.K; k += kBlock) {
          if (at == 0 || args.K > kBlock) {  // else rows still holds them all
            Pairs(args, b, points, queries, idxs, i, k, Min(k + kBlock, args.K), rows, q_bar);
          }
          if (F > 0) sum.Add(rows);
        }
        if (F > 0) sum.Write(args.f_out + (b * args.Q + i) * args.F);
        if (at == 0 && args.q_bar != nullptr) Store3(q_bar, args.q_bar + 3 * (b * args.Q + i));
      }
    }
  }

  // Phase 2.

  static int64_t GroupPairs(const Args& args) {
    int64_t n = args.Q * args.K;
    for (int a = 0; a < args.batch.ndim; ++a) {
      if (args.kept.size[a] != args.batch.size[a]) n *= args.batch.size[a];
    }
    return n;
  }
  static int64_t Ranges(const Args& args) { return Min(args.P, Ceil(args.P + GroupPairs(args), 4096)); }

  static int64_t PointTasks(const Args& args) { return WantsPoints(args) ? Count(args.kept) * Ranges(args) : 0; }

  // Finds the queries and factors of pairs in group set c.
  struct Cursor {
    const Args& args;
    const int64_t c, row;
    int64_t first = -1;  // the number of the first pair in the batch entry that the following are of
    Queries queries;
    const PairFactors<T>* factors = nullptr;  // of the entry

    Cursor(const Args& args, int64_t c) : args(args), c(c), row(args.Q * args.K), queries() {}

    // The pair's place in its entry.
    int64_t Seek(int64_t pair) {
      if (first < 0 || pair < first || pair >= first + row) {
        const int64_t s = pair / row, b = FullEntry(args.batch, args.kept, c, s);
        first = s * row;
        queries = Queries(args, b);
        factors = args.factors + b * row;
      }
      return pair - first;
    }
    void PrefetchFactors(int64_t pair) const {
      if (first >= 0 && pair >= first && pair < first + row) __builtin_prefetch(factors + (pair - first));
    }
    int64_t QueryOf(int64_t slot) const { return static_cast<uint32_t>(slot) / static_cast<uint32_t>(args.K); }
  };

  // The first point of range r: points are split where their number and that of their pairs, together, are.
  static int64_t Split(const Args& args, const int32_t* offsets, int64_t r) {
    const int64_t target = (args.P + offsets[args.P]) * r / Ranges(args);
    int64_t low = 0, high = args.P;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (middle + offsets[middle] < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  static void DoPoints(const Args& args, void* /*scratch*/, int64_t task) {
    const int64_t c = task / Ranges(args), r = task % Ranges(args);
    const Points points(args, args.kept, c);
    const int32_t* order = AtOrNull(args.order, args.kept, c);
    const int32_t* offsets = At(args.offsets, args.kept, c);
    Cursor cursor(args, c);
    const int64_t end = Split(args, offsets, r + 1);
    for (int64_t j = Split(args, offsets, r); j < end; ++j) {
      if (args.p_bar != nullptr || args.sigma_bar != nullptr || args.R_bar != nullptr) {
        DoGeometry(args, points, order, offsets[j], offsets[j + 1], j, c * args.P + j, cursor);
      }
      if (args.f_bar != nullptr) DoFeatures(args, order, offsets[j], offsets[j + 1], c * args.P + j, cursor);
    }
  }

  static void DoGeometry(const Args& args, const Points& points, const int32_t* order, int64_t begin, int64_t end,
                         int64_t j, int64_t at, Cursor& cursor) {
    const Parameters m = points.Load(j);
    const Parameters dm = kTangents ? points.LoadTangent(j) : Parameters{};
    Parameters m_bar = {};
    Vec3<T> d_bar = {0, 0, 0};
    constexpr int64_t kAhead = 12;
    const int64_t num_pairs = GroupPairs(args);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t slot = cursor.Seek(order[n]), i = cursor.QueryOf(slot);
      if (n + kAhead < num_pairs) cursor.PrefetchFactors(order[n + kAhead]);
      if (!HasMetricTerms(cursor.factors[slot])) continue;
      Accumulate(d_bar, Gradient(points, cursor.queries, i, j, m, dm, cursor.factors[slot], m_bar));
    }
    if (args.p_bar != nullptr) Store3(Vec3<T>{0, 0, 0} - d_bar, args.p_bar + 3 * at);
    if constexpr (M::kR > 0) {
      if (args.sigma_bar != nullptr) Store3(m_bar.sigma, args.sigma_bar + 3 * at);
      for (int row = 0; row < 3 && args.R_bar != nullptr; ++row)
        Store3(m_bar.R.row[row], args.R_bar + 9 * at + 3 * row);
    } else {
      if (args.sigma_bar != nullptr) args.sigma_bar[at] = m_bar.sigma;
    }
  }

  static void DoFeatures(const Args& args, const int32_t* order, int64_t begin, int64_t end, int64_t at,
                         Cursor& cursor) {
    for (int64_t feature = 0; feature < args.F; feature += RowSum<T, TF>::kFeatures) {
      RowSum<T, TF> sum(args.F, feature);
      for (int64_t block = begin; block < end; block += kBlock) {
        Rows<T, TF> rows;
        for (int64_t n = block; n < Min(block + kBlock, end); ++n) {
          const int64_t slot = cursor.Seek(order[n]);
          if (cursor.queries.ct_f == nullptr) break;
          const TF* row = cursor.queries.ct_f + cursor.QueryOf(slot) * args.F;
          Prefetch(row + feature, args.F - feature);
          rows.Add(row, cursor.factors[slot].feature);
        }
        sum.Add(rows);
      }
      sum.Write(args.f_bar + at * args.F);
    }
  }

  static constexpr CpuKernel<Args> Kernel() {
    if constexpr (kCotangents) {
      return {nullptr, {{&QueryTasks, &DoQueries}, {&PointTasks, &DoPoints}}};
    } else {
      return {nullptr, {{&QueryTasks, &DoQueries}, {nullptr, nullptr}}};
    }
  }
};

template <class T, class TF, template <class> class Metric>
CpuKernel<Aggregate<T, TF>> OfRole(AggregateRole role) {
  switch (role) {
    case AggregateRole::kValue:
      return Aggregator<T, TF, Metric, AggregateRole::kValue>::Kernel();
    case AggregateRole::kJvp:
      return Aggregator<T, TF, Metric, AggregateRole::kJvp>::Kernel();
    case AggregateRole::kVjp:
      return Aggregator<T, TF, Metric, AggregateRole::kVjp>::Kernel();
    default:
      return Aggregator<T, TF, Metric, AggregateRole::kVjpVjp>::Kernel();
  }
}

}  // namespace

template <class T, class TF>
CpuKernel<Aggregate<T, TF>> AggregateKernel(MetricKind metric, AggregateRole role) {
  return metric == MetricKind::kAnisotropic ? OfRole<T, TF, Anisotropic>(role) : OfRole<T, TF, Isotropic>(role);
}

template CpuKernel<Aggregate<float, float>> AggregateKernel<float, float>(MetricKind, AggregateRole);
template CpuKernel<Aggregate<double, double>> AggregateKernel<double, double>(MetricKind, AggregateRole);
template CpuKernel<Aggregate<float, BFloat16>> AggregateKernel<float, BFloat16>(MetricKind, AggregateRole);
template CpuKernel<Aggregate<float, Half>> AggregateKernel<float, Half>(MetricKind, AggregateRole);

}  // namespace knn::KNN_ISA
