// The aggregate op and its derivatives on CPUs.
//
// Phase 1 sorts queries, and points, along a curve where what neighbours share would not stay in cache otherwise. Phase
// 2 goes through queries and writes what belongs to them, and the factors of each pair where phase 3 wants them. Phase
// 3 goes through points and sums over the pairs that name the point, in the order of the pair's number. Pairs are
// gathered into blocks, and the metric's code computes a SIMD vector of them at a time. Which pairs share a vector, and
// so how sums are rounded, depends on the operands alone: not on how many threads there are.

#include "knn/aggregate/cpu.h"

#include "common/simd.h"
#include "knn/curve.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kBlock = 64;  // pairs looked at together

// A number of each pair of a block.
template <class T>
using Column = T[kBlock];

template <class T>
void Store3(Vec3<T> a, T* out) {
  out[0] = a.x, out[1] = a.y, out[2] = a.z;
}

template <class T, class TF>
KNN_FN Vec<T> LoadWide(const TF* a, Stored stored) {
  if constexpr (sizeof(T) == sizeof(TF)) {
    return Vec<T>::Load(a);
  } else {
    T wide[Vec<T>::kLanes];
    if (stored == Stored::bfloat16) {
      for (int l = 0; l < Vec<T>::kLanes; ++l) wide[l] = Widen(BFloat16{a[l].bits});
    } else {
      for (int l = 0; l < Vec<T>::kLanes; ++l) wide[l] = Widen(Half{a[l].bits});
    }
    return Vec<T>::Load(wide);
  }
}

// ⟨a, b⟩. Not inlined: one for all metrics and roles.
template <class T, class TF>
[[gnu::noinline]] T DotRows(const TF* a, const TF* b, int64_t n, Stored stored) {
  using V = Vec<T>;
  V sums[2] = {V::Broadcast(0), V::Broadcast(0)};
  int64_t i = 0;
  for (; i + 2 * V::kLanes <= n; i += 2 * V::kLanes) {
    for (int s = 0; s < 2; ++s) {
      const int64_t at = i + s * V::kLanes;
      sums[s] = Fma(LoadWide<T>(a + at, stored), LoadWide<T>(b + at, stored), sums[s]);
    }
  }
  for (; i + V::kLanes <= n; i += V::kLanes) {
    sums[0] = Fma(LoadWide<T>(a + i, stored), LoadWide<T>(b + i, stored), sums[0]);
  }
  T sum = Sum(sums[0] + sums[1]);
  for (; i < n; ++i) sum = Fma(Widen(a[i], stored), Widen(b[i], stored), sum);
  return sum;
}

// Rows come in no order that memory would guess: it has to be asked for them early.
template <class U>
KNN_FN void Prefetch(const U* row, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(U);
  for (int64_t i = 0; i < Min(n, 8 * kLine); i += kLine) __builtin_prefetch(row + i);
}
template <class U>
KNN_FN void PrefetchRow(const U* rows, int64_t i, int64_t n) {
  if (rows != nullptr) Prefetch(rows + i * n, n);
}

// Rows of features, and what they are multiplied with.
template <class T, class TF>
struct Rows {
  int64_t n = 0;
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

  RowSum(int64_t F, int64_t begin, Stored stored) : short_(F < V::kLanes ? F : 0), stored_(stored) {
    for (int v = 0; v < kVectors; ++v) {
      // Vectors that would end behind the row are moved to end with it, and compute some sums twice, alike.
      start_[v] = short_ > 0 ? 0 : Min(begin + v * V::kLanes, F - V::kLanes);
      sum_[v] = V::Broadcast(0);
    }
  }

  void Add(const Rows<T, TF>& rows) {
    if (short_ > 0) {
      for (int64_t r = 0; r < rows.n; ++r) {
        for (int l = 0; l < short_; ++l) {
          sum_[0].v[l] = Fma(rows.factor[r], Widen(rows.row[r][l], stored_), sum_[0].v[l]);
        }
      }
      return;
    }
    V sum[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = sum_[v];
    for (int64_t r = 0; r < rows.n; ++r) {
      const V factor = V::Broadcast(rows.factor[r]);
      for (int v = 0; v < kVectors; ++v) sum[v] = Fma(factor, LoadWide<T>(rows.row[r] + start_[v], stored_), sum[v]);
    }
    for (int v = 0; v < kVectors; ++v) sum_[v] = sum[v];
  }

  void Write(TF* row) const {
    for (int v = 0; v < (short_ > 0 ? 1 : kVectors); ++v) {
      if (sizeof(T) == sizeof(TF) && short_ == 0) {
        std::memcpy(row + start_[v], &sum_[v], sizeof sum_[v]);
      } else {
        for (int l = 0; l < (short_ > 0 ? short_ : V::kLanes); ++l) Narrow(sum_[v].v[l], stored_, row + start_[v] + l);
      }
    }
  }

 private:
  int short_;  // the row's length if it is shorter than a vector, else 0
  Stored stored_;
  int64_t start_[kVectors];
  V sum_[kVectors];
};

template <class T, class TF, template <class> class Metric, AggregateRole role>
struct Aggregator {
  using Args = Aggregate<T, TF>;
  using V = Vec<T>;
  using M = Metric<V>;
  using Parameters = typename M::Parameters;
  static constexpr bool kMoving = role == AggregateRole::kVjpJvp;  // cotangents
  static constexpr bool kTangents = role == AggregateRole::kJvp || role == AggregateRole::kVjpVjp || kMoving;
  static constexpr bool kCotangents = role != AggregateRole::kValue && role != AggregateRole::kJvp;
  static constexpr bool kOuts = role != AggregateRole::kVjp && !kMoving;  // f_out, w_out, dists, where asked for
  static constexpr T kInf = static_cast<T>(HUGE_VAL);

  // Parameters as an array: sigma, then R.
  static constexpr int kParameters = M::kSigma + M::kR;
  static_assert(sizeof(Parameters) == kParameters * sizeof(V));
  static V* ArrayOf(Parameters& m) { return reinterpret_cast<V*>(&m); }

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

    // Parameters of point j, or their tangents: a number each, as far as there are any.
    template <class Take>
    static void EachParameter(const T* sigma, const T* R, int64_t j, Take&& take) {
      for (int i = 0; i < M::kSigma && sigma != nullptr; ++i) take(i, sigma[M::kSigma * j + i]);
      for (int i = 0; i < M::kR && R != nullptr; ++i) take(M::kSigma + i, R[M::kR * j + i]);
    }
    static Parameters Broadcast(const T* sigma, const T* R, int64_t j) {
      Parameters m = {};
      EachParameter(sigma, R, j, [&m](int i, T x) { ArrayOf(m)[i] = V::Broadcast(x); });
      return m;
    }
  };
  struct Queries {
    const T *q, *v_q, *ct_w, *ct_d, *v_ct_w, *v_ct_d;
    const TF *ct_f, *v_ct_f;

    Queries() = default;
    Queries(const Args& args, int64_t b)
        : q(AtOrNull(args.q, args.batch, b)),
          v_q(AtOrNull(args.v_q, args.batch, b)),
          ct_w(AtOrNull(args.ct_w, args.batch, b)),
          ct_d(AtOrNull(args.ct_d, args.batch, b)),
          v_ct_w(AtOrNull(args.v_ct_w, args.batch, b)),
          v_ct_d(AtOrNull(args.v_ct_d, args.batch, b)),
          ct_f(AtOrNull(args.ct_f, args.batch, b)),
          v_ct_f(AtOrNull(args.v_ct_f, args.batch, b)) {}
  };

  // d = q − p of a block's pairs, or its tangent.
  struct Differences {
    alignas(64) Column<T> at[3];

    void Put(int64_t n, const T* q, const T* p, int64_t i, int64_t j) {
      for (int a = 0; a < 3; ++a) at[a][n] = (q == nullptr ? 0 : q[3 * i + a]) - (p == nullptr ? 0 : p[3 * j + a]);
    }
    Vec3<V> Load(int64_t n) const { return {V::Load(at[0] + n), V::Load(at[1] + n), V::Load(at[2] + n)}; }
  };
  struct ParameterColumns {
    alignas(64) Column<T> at[kParameters];

    void Put(int64_t n, const T* sigma, const T* R, int64_t j) {
      Points::EachParameter(sigma, R, j, [this, n](int i, T x) { at[i][n] = x; });
    }
    Parameters Load(int64_t n) const {
      Parameters m;
      for (int i = 0; i < kParameters; ++i) ArrayOf(m)[i] = V::Load(at[i] + n);
      return m;
    }
  };
  // A pair's factors as an array: `feature` first.
  using Factors = FactorsOf<T, kMoving>;
  using FactorVectors = FactorsOf<V, kMoving>;
  static constexpr int kFactors = kMoving ? 6 : 4;
  static T* ArrayOf(Factors& x) { return reinterpret_cast<T*>(&x); }
  static V* ArrayOf(FactorVectors& x) { return reinterpret_cast<V*>(&x); }
  static const T* ArrayOf(const Factors& x) { return reinterpret_cast<const T*>(&x); }
  static const V* ArrayOf(const FactorVectors& x) { return reinterpret_cast<const V*>(&x); }

  struct FactorColumns {
    alignas(64) Column<T> at[kFactors];

    void Put(int64_t n, const Factors& x) {
      for (int i = 0; i < kFactors; ++i) at[i][n] = ArrayOf(x)[i];
    }
    Factors Get(int64_t n) const {
      Factors x;
      for (int i = 0; i < kFactors; ++i) ArrayOf(x)[i] = at[i][n];
      return x;
    }
    FactorVectors Load(int64_t n) const {
      FactorVectors x;
      for (int i = 0; i < kFactors; ++i) ArrayOf(x)[i] = V::Load(at[i] + n);
      return x;
    }
    void Store(int64_t n, const FactorVectors& x) {
      for (int i = 0; i < kFactors; ++i) ArrayOf(x)[i].Store(at[i] + n);
    }
  };

  // The gradient in d of what pairs add; adds that in the parameters to m_bar.
  static Vec3<V> Gradient(const Parameters& m, const Parameters& dm, Vec3<V> d, Vec3<V> dd, const FactorVectors& by,
                          Parameters& m_bar) {
    if constexpr (kTangents) {
      return SecondOrderGradient<M>(m, d, dd, dm, by, m_bar);
    } else {
      return M::Gradient(m, d, {by.dist, by.exponent}, m_bar);
    }
  }

  static Factors* FactorsOfPairs(const Args& args) { return static_cast<Factors*>(args.factors); }

  static bool WantsGeometry(const Args& args) {
    return args.p_bar != nullptr || args.sigma_bar != nullptr || args.R_bar != nullptr;
  }

  // Phase 1.

  // Rows of features, or of their cotangents, that take no more than this stay in cache whatever the order, and then
  // the order in memory is best for what is read once.
  static constexpr int64_t kCache = 1 << 20;
  static bool Large(const Args& args, int64_t rows) {
    return rows * args.F * static_cast<int64_t>(sizeof(TF)) > kCache;
  }

  static int64_t GroupSets(const Args& args) { return kCotangents && WantsPoints(args) ? Count(args.kept) : 0; }

  // How many entries' queries, and how many group sets' points, phase 1 sorts.
  static int64_t QuerySorts(const Args& args) { return Large(args, args.P) ? Count(args.batch) : 0; }
  static int64_t PointSorts(const Args& args) { return Large(args, args.Q) ? GroupSets(args) : 0; }
  static int64_t SortTasks(const Args& args) { return QuerySorts(args) + PointSorts(args); }

  static int64_t ScratchBytes(const Args& args) {
    return 2 * sizeof(uint64_t) * (QuerySorts(args) * args.Q + PointSorts(args) * args.P);
  }

  // Numbers in the order in which to take them.
  struct Order {
    uint64_t* keys;  // or null
    int64_t operator[](int64_t n) const { return keys == nullptr ? n : static_cast<uint32_t>(keys[n]); }
  };
  static Order QueryOrder(const Args& args, void* scratch, int64_t b) {
    return {QuerySorts(args) == 0 ? nullptr : static_cast<uint64_t*>(scratch) + 2 * b * args.Q};
  }
  static Order PointOrder(const Args& args, void* scratch, int64_t c) {
    if (PointSorts(args) == 0) return {nullptr};
    return {static_cast<uint64_t*>(scratch) + 2 * (QuerySorts(args) * args.Q + c * args.P)};
  }

  static void Sort(const Args& args, void* scratch, int64_t task) {
    const int64_t c = task - QuerySorts(args);
    if (c < 0) {
      SortAlongCurve(At(args.q, args.batch, task), args.Q, QueryOrder(args, scratch, task).keys);
    } else {
      SortAlongCurve(At(args.p, args.kept, c), args.P, PointOrder(args, scratch, c).keys);
    }
  }

  // Phase 2.

  static constexpr int64_t kQueriesPerTask = 128;
  static int64_t QueryTasks(const Args& args) { return Count(args.batch) * CeilDiv(args.Q, kQueriesPerTask); }

  static void PrefetchQuery(const Args& args, const Queries& queries, const int32_t* idxs, int64_t b, int64_t i) {
    PrefetchRow(idxs, i, args.K);
    PrefetchRow(queries.q, i, 3);
    PrefetchRow(queries.ct_f, i, args.F);
    PrefetchRow(queries.ct_w, i, args.K);
    PrefetchRow(queries.ct_d, i, args.K);
    if constexpr (kMoving) {
      PrefetchRow(queries.v_ct_f, i, args.F);
      PrefetchRow(queries.v_ct_w, i, args.K);
      PrefetchRow(queries.v_ct_d, i, args.K);
    }
    PrefetchRow(args.f_out, b * args.Q + i, args.F);
    PrefetchRow(args.w_out, b * args.Q + i, args.K);
    PrefetchRow(args.dists, b * args.Q + i, args.K);
    PrefetchRow(FactorsOfPairs(args), b * args.Q + i, args.K);
  }

  // Pairs of some queries, as phase 2 looks at them: the pairs of one query, and then those of the next.
  struct Block {
    int64_t n;
    int64_t slot[kBlock], point[kBlock];  // point is −1, and columns hold anything, where there is no neighbour
    Differences d, dd;
    ParameterColumns m, dm;
    alignas(64) Column<T> exists;            // 1 or 0
    alignas(64) Column<T> ct_w, ct_d, b, a;  // b = ⟨g, f⟩ and a = ⟨g, ḟ⟩, or all of Ȧ
    alignas(64) Column<T> v_ct_d;
    alignas(64) Column<T> w, w_value, dist;  // of dist and w_value, the tangents if there are any
    FactorColumns factors;
    Differences q_bar;
  };

  // Appends neighbours [begin, end) of query i.
  static void Gather(const Args& args, const Points& points, const Queries& queries, const int32_t* idxs, int64_t i,
                     int64_t begin, int64_t end, Block& block) {
    const bool dots = kCotangents && queries.ct_f != nullptr && (args.q_bar != nullptr || WantsGeometry(args));
    for (int64_t k = begin; k < end; ++k) {
      const int64_t slot = i * args.K + k, n = block.n++;
      const bool exists = Names(idxs[slot], args.P);
      const int64_t j = exists ? idxs[slot] : -1;
      block.slot[n] = slot;
      block.point[n] = j;
      block.exists[n] = exists;
      if (!exists) continue;
      block.d.Put(n, queries.q, points.p, i, j);
      block.m.Put(n, points.sigma, points.R, j);
      Prefetch(points.f + j * args.F, args.F);
      if constexpr (kTangents) {
        block.dd.Put(n, queries.v_q, points.v_p, i, j);
        block.dm.Put(n, points.v_sigma, points.v_R, j);
        if (points.v_f != nullptr) Prefetch(points.v_f + j * args.F, args.F);
      }
      if constexpr (kCotangents) {
        block.ct_w[n] = queries.ct_w == nullptr ? 0 : queries.ct_w[slot];
        block.ct_d[n] = queries.ct_d == nullptr ? 0 : queries.ct_d[slot];
      }
      if constexpr (kMoving) {
        block.a[n] = queries.v_ct_w == nullptr ? 0 : queries.v_ct_w[slot];
        block.v_ct_d[n] = queries.v_ct_d == nullptr ? 0 : queries.v_ct_d[slot];
      }
    }
    if (!dots) return;
    for (int64_t n = block.n - (end - begin); n < block.n; ++n) {
      const int64_t j = block.point[n];
      if (j < 0) continue;
      const TF *g = queries.ct_f + i * args.F, *f = points.f + j * args.F;
      block.b[n] = DotRows<T>(g, f, args.F, args.stored);
      if (kTangents && points.v_f != nullptr) {
        block.a[n] = DotRows<T>(g, points.v_f + j * args.F, args.F, args.stored) + (kMoving ? block.a[n] : 0);
      }
      if (kMoving && queries.v_ct_f != nullptr) {
        block.a[n] += DotRows<T>(queries.v_ct_f + i * args.F, f, args.F, args.stored);
      }
    }
  }

  static void Compute(const Args& args, Block& block) {
    const V zero = V::Broadcast(0);
    for (int64_t n = 0; n < block.n; n += V::kLanes) {
      const Parameters m = block.m.Load(n);
      const Vec3<V> d = block.d.Load(n);
      Pair<V> value = M::Value(m, d);  // D and e, or their tangents
      const V exists = Select(value.dist.v == kInf, zero, V::Load(block.exists + n));
      const auto if_exists = [&exists](V x) { return Select(exists.v != 0, x, V::Broadcast(0)); };
      const V w = if_exists(Exp(-value.exponent));
      V w_value = w;
      if constexpr (role == AggregateRole::kValue) {
        value.dist = Select(exists.v != 0, value.dist, V::Broadcast(kInf));
      }
      if constexpr (kTangents) {
        const Parameters dm = block.dm.Load(n);
        const Vec3<V> dd = block.dd.Load(n);
        value = M::Tangent(m, d, dd, dm);
        value = {if_exists(value.dist), if_exists(value.exponent)};
        w_value = if_exists(-w * value.exponent);
      }
      if constexpr (kCotangents) {
        const V b = V::Load(block.b + n), ct_w = V::Load(block.ct_w + n), ct_d = V::Load(block.ct_d + n);
        FactorVectors by;
        PairFactors<V>& common = by;
        if constexpr (role == AggregateRole::kVjp) {
          common = FirstOrderFactors(w, b, ct_w, ct_d);
        } else {
          common = SecondOrderFactors(w, b, ct_w, ct_d, V::Load(block.a + n), value.exponent);
        }
        if constexpr (kMoving) {
          by.moving_feature = w;
          by.a_dist = V::Load(block.v_ct_d + n);
        }
        by.feature = Select(exists.v != 0, by.feature, V::Broadcast(NoFactors<T>().feature));
        for (int i = 1; i < kFactors; ++i) ArrayOf(by)[i] = if_exists(ArrayOf(by)[i]);
        block.factors.Store(n, by);
        if (args.q_bar != nullptr) {
          Parameters unused = {};
          const Vec3<V> g = Gradient(m, block.dm.Load(n), d, block.dd.Load(n), by, unused);
          if_exists(g.x).Store(block.q_bar.at[0] + n);
          if_exists(g.y).Store(block.q_bar.at[1] + n);
          if_exists(g.z).Store(block.q_bar.at[2] + n);
        }
      }
      exists.Store(block.exists + n);
      w.Store(block.w + n);
      w_value.Store(block.w_value + n);
      value.dist.Store(block.dist + n);
    }
  }

  // Writes what belongs to pairs of batch entry b.
  static void WritePairs(const Args& args, int64_t b, const Block& block) {
    const int64_t first = b * args.Q * args.K;
    for (int64_t n = 0; n < block.n; ++n) {
      const int64_t at = first + block.slot[n];
      if (kOuts && args.w_out != nullptr) args.w_out[at] = block.w_value[n];
      if (kOuts && args.dists != nullptr) args.dists[at] = block.dist[n];
      if (kCotangents && WantsPoints(args)) FactorsOfPairs(args)[at] = block.factors.Get(n);
    }
  }

  // Rows that pairs [begin, end) add to f_out.
  static void RowsOf(const Args& args, const Points& points, const Block& block, int64_t begin, int64_t end,
                     Rows<T, TF>& rows) {
    rows.n = 0;
    for (int64_t n = begin; n < end; ++n) {
      if (block.exists[n] == 0) continue;
      rows.Add(points.f + block.point[n] * args.F, block.w_value[n]);
      if (kTangents && points.v_f != nullptr) rows.Add(points.v_f + block.point[n] * args.F, block.w[n]);
    }
  }

  static void DoQueries(const Args& args, void* scratch, int64_t task) {
    const int64_t tasks = CeilDiv(args.Q, kQueriesPerTask), b = task / tasks, K = args.K;
    const int64_t begin = task % tasks * kQueriesPerTask, end = Min(begin + kQueriesPerTask, args.Q);
    const Points points(args, args.batch, b);
    const Queries queries(args, b);
    const int32_t* idxs = At(args.idxs, args.batch, b);
    const Order query = QueryOrder(args, scratch, b);
    const int64_t F = kOuts && args.f_out != nullptr ? args.F : 0;
    Block block = {};
    Rows<T, TF> rows;
    const int64_t together = K > kBlock ? 1 : kBlock / (K < 1 ? 1 : K);
    for (int64_t first = begin; first < end; first += together) {
      const int64_t last = Min(first + together, end);
      for (int64_t i = last; i < Min(last + together, end); ++i) PrefetchQuery(args, queries, idxs, b, query[i]);
      // Several queries are one block. The pairs of one query with many neighbours are several blocks, which have to be
      // computed anew for every window of features.
      for (int64_t i = first; i < last; ++i) {
        Vec3<T> q_bar = {0, 0, 0};
        for (int64_t window = 0; window == 0 || window < F; window += RowSum<T, TF>::kFeatures) {
          RowSum<T, TF> sum(F, window, args.stored);
          for (int64_t k = 0; k < K; k += kBlock) {
            const int64_t of_query = Min(kBlock, K - k);
            if (K > kBlock || (window == 0 && i == first)) {
              block.n = 0;
              for (int64_t j = i; j < (K > kBlock ? i + 1 : last); ++j) {
                Gather(args, points, queries, idxs, query[j], k, k + of_query, block);
              }
              Compute(args, block);
              WritePairs(args, b, block);
            }
            const int64_t at = K > kBlock ? 0 : (i - first) * K;
            if (window == 0 && args.q_bar != nullptr) {
              for (int64_t n = at; n < at + of_query; ++n) {
                Accumulate(q_bar, Vec3<T>{block.q_bar.at[0][n], block.q_bar.at[1][n], block.q_bar.at[2][n]});
              }
            }
            if (F > 0) {
              RowsOf(args, points, block, at, at + of_query, rows);
              sum.Add(rows);
            }
          }
          if (F > 0) sum.Write(args.f_out + (b * args.Q + query[i]) * args.F);
        }
        if (args.q_bar != nullptr) Store3(q_bar, args.q_bar + 3 * (b * args.Q + query[i]));
      }
    }
  }

  // Phase 3.

  static constexpr int64_t kPointsPerTask = 32;
  static int64_t PointTasks(const Args& args) { return GroupSets(args) * CeilDiv(args.P, kPointsPerTask); }

  // Finds the queries and factors of pairs in group set c.
  struct Cursor {
    const Args& args;
    const int64_t c, row;
    int64_t first = -1;  // the number of the first pair in the batch entry that the following are of
    Queries queries;
    const Factors* factors = nullptr;  // of the entry

    Cursor(const Args& args, int64_t c) : args(args), c(c), row(args.Q * args.K), queries() {}

    // The pair's place in its entry.
    int64_t Seek(int64_t pair) {
      if (first < 0 || pair < first || pair >= first + row) {
        const int64_t s = pair / row, b = Join(Split(args.batch, args.kept), c, s);
        first = s * row;
        queries = Queries(args, b);
        factors = FactorsOfPairs(args) + b * row;
      }
      return pair - first;
    }
    void PrefetchFactors(int64_t pair) const {
      if (first >= 0 && pair >= first && pair < first + row) __builtin_prefetch(factors + (pair - first));
    }
    int64_t QueryOf(int64_t slot) const { return static_cast<uint32_t>(slot) / static_cast<uint32_t>(args.K); }
  };

  // What of a block of pairs is not the point's.
  struct Others {
    Differences d, dd;
    FactorColumns factors;
    int64_t n;  // pairs with terms of the metric
    Rows<T, TF> rows;
  };

  static void Gather(const Args& args, const Points& points, const int32_t* order, int64_t begin, int64_t end,
                     int64_t end_of_point, int64_t j, Cursor& cursor, Others& others) {
    const bool geometry = WantsGeometry(args), features = args.f_bar != nullptr;
    constexpr int64_t kAhead = 12;
    const int64_t last = end_of_point;
    others.n = others.rows.n = 0;
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t slot = cursor.Seek(order[pair]), i = cursor.QueryOf(slot);
      const Factors by = cursor.factors[slot];
      if (pair + kAhead < last) cursor.PrefetchFactors(order[pair + kAhead]);
      if (geometry) {
        others.d.Put(others.n, cursor.queries.q, points.p, i, j);
        if constexpr (kTangents) others.dd.Put(others.n, cursor.queries.v_q, points.v_p, i, j);
        others.factors.Put(others.n, by);
        others.n += Adds(by.feature);
      }
      const auto add_row = [&](const TF* rows, T factor) {
        if (!features || rows == nullptr || !Adds(by.feature)) return;
        PrefetchRow(rows, i, args.F);
        others.rows.Add(rows + i * args.F, factor);
      };
      add_row(cursor.queries.ct_f, by.feature);
      if constexpr (kMoving) add_row(cursor.queries.v_ct_f, by.moving_feature);
    }
  }

  static void DoPoints(const Args& args, void* scratch, int64_t task) {
    const int64_t tasks = CeilDiv(args.P, kPointsPerTask), c = task / tasks;
    const int64_t begin = task % tasks * kPointsPerTask, end = Min(begin + kPointsPerTask, args.P);
    const Points points(args, args.kept, c);
    const int32_t* order = AtOrNull(args.order, args.kept, c);
    const int32_t* offsets = At(args.offsets, args.kept, c);
    const Order point = PointOrder(args, scratch, c);
    Cursor cursor(args, c);
    Others others = {};
    for (int64_t n = begin; n < end; ++n) {
      DoPoint(args, points, order, offsets, c, point[n], cursor, others);
    }
  }

  static void DoPoint(const Args& args, const Points& points, const int32_t* order, const int32_t* offsets, int64_t c,
                      int64_t j, Cursor& cursor, Others& others) {
    const int64_t at = c * args.P + j, begin = offsets[j], end = offsets[j + 1];
    const Parameters m = Points::Broadcast(points.sigma, points.R, j);
    const Parameters dm = kTangents ? Points::Broadcast(points.v_sigma, points.v_R, j) : Parameters{};
    Parameters m_bar = {};
    Vec3<V> d_bar = {};
    const int64_t F = args.f_bar == nullptr ? 0 : args.F;
    for (int64_t window = 0; window == 0 || window < F; window += RowSum<T, TF>::kFeatures) {
      RowSum<T, TF> sum(F, window, args.stored);
      for (int64_t block = begin; block < end; block += kBlock) {
        if (window == 0 || end - begin > kBlock) {  // else others still holds them all
          Gather(args, points, order, block, Min(block + kBlock, end), end, j, cursor, others);
        }
        for (int64_t l = 0; window == 0 && l < others.n; l += V::kLanes) {
          Parameters add = {};
          const Vec3<V> g = Gradient(m, dm, others.d.Load(l), others.dd.Load(l), others.factors.Load(l), add);
          // Lanes past the last pair hold anything.
          const auto exists = V::Ramp().v < static_cast<T>(others.n - l);
          const auto accumulate = [&](V& sum, V x) { sum = sum + Select(exists, x, V::Broadcast(0)); };
          accumulate(d_bar.x, g.x), accumulate(d_bar.y, g.y), accumulate(d_bar.z, g.z);
          for (int i = 0; i < kParameters; ++i) accumulate(ArrayOf(m_bar)[i], ArrayOf(add)[i]);
        }
        if (F > 0) sum.Add(others.rows);
      }
      if (F > 0) sum.Write(args.f_bar + at * F);
    }
    if (args.p_bar != nullptr) Store3(Vec3<T>{-Sum(d_bar.x), -Sum(d_bar.y), -Sum(d_bar.z)}, args.p_bar + 3 * at);
    for (int i = 0; i < M::kSigma && args.sigma_bar != nullptr; ++i) {
      args.sigma_bar[M::kSigma * at + i] = Sum(ArrayOf(m_bar)[i]);
    }
    for (int i = 0; i < M::kR && args.R_bar != nullptr; ++i) {
      args.R_bar[M::kR * at + i] = Sum(ArrayOf(m_bar)[M::kSigma + i]);
    }
  }

  static constexpr CpuKernel<Args> kKernel = {
      &ScratchBytes,
      {{&SortTasks, &Sort}, {&QueryTasks, &DoQueries}, {&PointTasks, kCotangents ? &DoPoints : nullptr}}};
};

template <class T, class TF, template <class> class Metric>
CpuKernel<Aggregate<T, TF>> OfRole(AggregateRole role) {
  switch (role) {
    case AggregateRole::kValue:
      return Aggregator<T, TF, Metric, AggregateRole::kValue>::kKernel;
    case AggregateRole::kJvp:
      return Aggregator<T, TF, Metric, AggregateRole::kJvp>::kKernel;
    case AggregateRole::kVjp:
      return Aggregator<T, TF, Metric, AggregateRole::kVjp>::kKernel;
    case AggregateRole::kVjpVjp:
      return Aggregator<T, TF, Metric, AggregateRole::kVjpVjp>::kKernel;
    default:
      return Aggregator<T, TF, Metric, AggregateRole::kVjpJvp>::kKernel;
  }
}

}  // namespace

template <class T, class TF>
CpuKernel<Aggregate<T, TF>> AggregateKernel(MetricKind metric, AggregateRole role, const Aggregate<T, TF>&) {
  return metric == MetricKind::kAnisotropic ? OfRole<T, TF, Anisotropic>(role) : OfRole<T, TF, Isotropic>(role);
}

#define KNN_INSTANTIATE(T, TF) \
  template CpuKernel<Aggregate<T, TF>> AggregateKernel(MetricKind, AggregateRole, const Aggregate<T, TF>&);
KNN_INSTANTIATE(float, float)
KNN_INSTANTIATE(double, double)
KNN_INSTANTIATE(float, Float16)
#undef KNN_INSTANTIATE

}  // namespace knn::KNN_ISA
