// The search on CPUs, through the index of index.h.
//
// Queries are taken along a curve, so that one query's neighbours are a good guess at the next one's: the leaves that
// hold them are visited first, and the largest of their distances bounds the search from the start. Then the tree is
// searched for leaves that may hold nearer points. A leaf's distances are computed without a branch (the metric's code,
// with a SIMD vector for its scalar), and those within the bound are appended to the query's candidates. When these no
// longer fit, all but the K nearest are dropped and the bound becomes the K-th's distance.
//
// Distances of +inf and NaN are never candidates; the rare query that needs them looks for them in the end.

#include "knn/search/cpu.h"

#include <limits>
#include <utility>

#include "common/simd.h"
#include "knn/curve.h"

namespace knn::KNN_ISA {
namespace {

static_assert(kLeafSize == 32 && kFanOut == 32, "a bit of a word for each point of a leaf, or node of a group");
constexpr int kRun = 64;  // candidates sorted at a time, a bit of a word for each

// Points that a query has found. A place is a point's number in the leaves.
template <class T>
struct Found {
  T* dist;         // [capacity]
  int32_t* place;  // [capacity]
};

template <class T>
struct Candidates : Found<T> {
  int64_t n;
  T bound;         // points further away than this are not among the K nearest
  int64_t sorted;  // how many in front are in order
};

// n points, at most kRun, from `begin` on, sorted by (distance, index); `order` has the indices.
template <class T>
void SortRun(Found<T> from, Found<T> to, int64_t begin, int64_t n, const int32_t* order) {
  using V = Vec<T>;
  using Rank = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  const T* dist = from.dist + begin;
  const int32_t* place = from.place + begin;
  alignas(64) Rank rank[kRun];
  for (int64_t i = 0; i < n; i += V::kLanes) {  // past n there is something, as runs are padded
    const V x = V::Load(dist + i);
    decltype(x.v < x.v) less = {};
#pragma GCC unroll 4
    for (int64_t j = 0; j < n; ++j) less += V::Broadcast(dist[j]).v < x.v;  // −1 where true
    less = -less;
    std::memcpy(rank + i, &less, sizeof less);
  }
  to.dist += begin;
  to.place += begin;
  uint64_t taken = 0;
  for (int64_t i = 0; i < n; ++i) {
    Rank at = rank[i];
    int32_t x = place[i];
    for (; taken >> at & 1; ++at) {  // an equal distance is there
      if (order[to.place[at]] > order[x]) std::swap(to.place[at], x);
    }
    taken |= uint64_t(1) << at;
    to.dist[at] = dist[i];
    to.place[at] = x;
  }
}

// Sorted runs of `width` points, merged two by two.
template <class T>
void MergeRuns(Found<T> from, Found<T> to, int64_t n, int64_t width, const int32_t* order) {
  for (int64_t begin = 0; begin < n; begin += 2 * width) {
    const int64_t middle = Min(begin + width, n), end = Min(begin + 2 * width, n);
    for (int64_t i = begin, j = middle, k = begin; k < end; ++k) {
      bool first = j == end;
      if (i < middle && j < end) {
        first = from.dist[i] < from.dist[j] ||
                (from.dist[i] == from.dist[j] && order[from.place[i]] < order[from.place[j]]);
      }
      const int64_t at = first ? i++ : j++;
      to.dist[k] = from.dist[at];
      to.place[k] = from.place[at];
    }
  }
}

// Moves point i to its place among those before it, which are in order.
template <class T>
void Insert(Found<T> found, int64_t i, const int32_t* order) {
  const T dist = found.dist[i];
  const int32_t place = found.place[i];
  for (; i > 0; --i) {
    const T before = found.dist[i - 1];
    if (before < dist || (before == dist && order[found.place[i - 1]] < order[place])) break;
    found.dist[i] = before;
    found.place[i] = found.place[i - 1];
  }
  found.dist[i] = dist;
  found.place[i] = place;
}

// Sorts the candidates by (distance, index) and keeps at most K. `spare` is exchanged for the candidates' memory.
template <class T>
void Compact(Candidates<T>& c, Found<T>& spare, int64_t K, const int32_t* order) {
  if (c.n - c.sorted <= 4 && c.n <= 2 * kRun) {
    for (int64_t i = c.sorted; i < c.n; ++i) Insert<T>(c, i, order);
    c.n = c.sorted = Min(c.n, K);
    if (c.n == K) c.bound = c.dist[K - 1];
    return;
  }
  const auto exchange = [&] { std::swap<Found<T>>(c, spare); };
  for (int64_t i = 0; i < c.n; i += kRun) SortRun<T>(c, spare, i, Min(kRun, c.n - i), order);
  exchange();
  for (int64_t width = kRun; width < c.n; width *= 2) {
    MergeRuns<T>(c, spare, c.n, width, order);
    exchange();
  }
  c.n = c.sorted = Min(c.n, K);
  if (c.n == K) c.bound = c.dist[K - 1];
}

template <class T, template <class> class Metric>
struct Searcher {
  using V = Vec<T>;
  static constexpr MetricKind kKind = Metric<T>::kKind;
  static constexpr bool kAnisotropic = kKind == MetricKind::kAnisotropic;
  static constexpr int64_t kRows = kLeafRows<kKind>;
  static constexpr T kMax = std::numeric_limits<T>::max();

  static int64_t KeyBytes(const Search<T>& s) {
    return CeilDiv(Count(s.batch) * 2 * s.Q * int64_t{sizeof(uint64_t)}, 64) * 64;
  }
  static int64_t ScratchBytes(const Search<T>& s) { return KeyBytes(s) + Tasks(s) * CandidateBytes(s); }

  // The order of queries.

  static uint64_t* Keys(const Search<T>& s, void* scratch, int64_t b) {
    return static_cast<uint64_t*>(scratch) + b * 2 * s.Q;
  }

  static int64_t SortTasks(const Search<T>& s) { return Count(s.batch); }

  static void SortQueries(const Search<T>& s, void* scratch, int64_t b) {
    SortAlongCurve(At(s.q, s.batch, b), s.Q, Keys(s, scratch, b));
  }

  // The search itself.

  // Queries that go through the tree together: they share the loads of points, and what a branch costs.
  static constexpr int kTogether = 2;
  // Leaves visited before others. If it takes more to hold one query's neighbours, they give the next no bound.
  static constexpr int kSeeds = 64;

  // Candidates of one query. A leaf's may go behind the capacity that counts.
  static int64_t Capacity(const Search<T>& s) { return CeilDiv(2 * s.K, kRun) * kRun; }
  static int64_t CandidateBytes(const Search<T>& s) {
    return (kTogether + 1) * (Capacity(s) + kRun) * (sizeof(T) + sizeof(int32_t));
  }

  static int64_t Packets(const Search<T>& s) { return CeilDiv(s.Q, kTogether); }
  static int64_t Tasks(const Search<T>& s) {
    constexpr int64_t kMost = 256, kMostBytes = 64 << 20, kPackets = 16;
    const int64_t fit = Max(kMostBytes / CandidateBytes(s), 1);
    return Min(CeilDiv(Count(s.batch) * Packets(s), kPackets), Min(fit, kMost));
  }

  using Dists = T[kTogether][kLeafSize];

  // What a task is busy with.
  struct Work {
    const T* leaves;
    const int32_t* order;
    const T* nodes;
    IndexShape shape;
    int64_t K, capacity, length;

    Vec3<T> q[kTogether], finite_q[kTogether];
    Candidates<T> candidates[kTogether];
    Found<T> spare;

    int num_seeds;
    int32_t seeds[kSeeds];

    // Which leaves of a group are seeds, a bit for each.
    uint32_t SeedsIn(int64_t group) const {
      uint32_t mask = 0;
      for (int i = 0; i < num_seeds; ++i) mask |= uint32_t(seeds[i] / kFanOut == group) << seeds[i] % kFanOut;
      return mask;
    }
    void CompactOf(int i) {
      if (candidates[i].n > candidates[i].sorted) Compact(candidates[i], spare, K, order);
    }
  };

  static Vec3<V> Broadcast(Vec3<T> a) { return {V::Broadcast(a.x), V::Broadcast(a.y), V::Broadcast(a.z)}; }

  static typename Metric<V>::Parameters LoadParameters(const T* point) {
    if constexpr (kAnisotropic) {
      const auto row = [point](int i) { return V::Load(point + i * kLeafSize); };
      return {{row(3), row(4), row(5)},
              {{{row(6), row(7), row(8)}, {row(9), row(10), row(11)}, {row(12), row(13), row(14)}}}};
    } else {
      return {V::Broadcast(0)};  // sigma, which the distance does not depend on
    }
  }

  static void Distances(const Work& w, int32_t leaf, Dists& dists) {
    Vec3<V> q[kTogether];
    for (int i = 0; i < kTogether; ++i) q[i] = Broadcast(w.q[i]);
    for (int l = 0; l < kLeafSize; l += V::kLanes) {
      const T* point = w.leaves + leaf * kRows * kLeafSize + l;
      const Vec3<V> p = {V::Load(point), V::Load(point + kLeafSize), V::Load(point + 2 * kLeafSize)};
      const auto m = LoadParameters(point);
      for (int i = 0; i < kTogether; ++i) Metric<V>::Distance(m, q[i] - p).Store(dists[i] + l);
    }
  }

  // The points of a leaf, a bit for each, without those that the index has but the search's own lengths leave out, and
  // numbers that no builder wrote.
  static uint32_t Existing(const Work& w, int32_t leaf) {
    const int32_t* order = w.order + leaf * kLeafSize;
    uint32_t mask = 0;
    for (int l = 0; l < kLeafSize; ++l) mask |= uint32_t{Names(order[l], w.length)} << l;
    return mask;
  }

  static void Take(Work& w, int32_t leaf, const Dists& dists) {
    for (int i = 0; i < kTogether; ++i) {
      Candidates<T>& c = w.candidates[i];
      if (c.n + kLeafSize > w.capacity || (c.bound == kMax && c.n >= w.K)) w.CompactOf(i);
      const V bound = V::Broadcast(c.bound);
      uint32_t within = 0;
      for (int l = 0; l < kLeafSize; l += V::kLanes) within |= LessEqualMask(V::Load(dists[i] + l), bound) << l;
      if (within == 0) continue;
      within &= Existing(w, leaf);
      for (int l = 0; l < kLeafSize; l += V::kLanes, within >>= V::kLanes % 32) {
        const uint32_t mask = within & ((uint64_t(1) << V::kLanes) - 1);
        c.n += Append(mask, V::Load(dists[i] + l), leaf * kLeafSize + l, c.dist + c.n, c.place + c.n);
      }
    }
  }

  // Starts from the leaves of the K candidates that a query before has left in `near`.
  static void VisitSeeds(Work& w, const Candidates<T>& near) {
    alignas(64) Dists dists[kSeeds];
    int64_t n = near.n;
    T bound[kTogether];
    for (T& x : bound) x = n == w.K ? -std::numeric_limits<T>::infinity() : kMax;
    w.num_seeds = 0;
    for (int64_t k = 0; k < n; ++k) {
      const int32_t leaf = near.place[k] / kLeafSize, lane = near.place[k] % kLeafSize;
      int seed = 0;
      while (seed < w.num_seeds && w.seeds[seed] != leaf) ++seed;
      if (seed == w.num_seeds) {
        if (seed == kSeeds) {
          for (T& x : bound) x = kMax;
          break;
        }
        w.seeds[w.num_seeds++] = leaf;
        Distances(w, leaf, dists[seed]);
      }
      for (int i = 0; i < kTogether; ++i) {
        const T dist = dists[seed][i][lane], number = dist <= kMax ? dist : kMax;
        bound[i] = number > bound[i] ? number : bound[i];
      }
    }
    for (int i = 0; i < kTogether; ++i) {
      w.candidates[i].n = w.candidates[i].sorted = 0;
      w.candidates[i].bound = bound[i];
    }
    for (int seed = 0; seed < w.num_seeds; ++seed) Take(w, w.seeds[seed], dists[seed]);
    for (int i = 0; i < kTogether; ++i) w.CompactOf(i);
  }

  static void VisitLeaf(Work& w, int32_t leaf) {
    alignas(64) Dists dists;
    Distances(w, leaf, dists);
    Take(w, leaf, dists);
  }

  // The bounds (1) of index.h for all nodes of a group.
  static void Bounds(const Work& w, const T* group, T (&bounds)[kTogether][kFanOut]) {
    Vec3<V> q[kTogether];
    for (int i = 0; i < kTogether; ++i) q[i] = Broadcast(w.finite_q[i]);
    for (int l = 0; l < kFanOut; l += V::kLanes) {
      const auto row = [&](int i) { return V::Load(group + i * kFanOut + l); };
      for (int i = 0; i < kTogether; ++i) {
        const auto gap = [&](int a, V x) { return Max(Max(row(kLow + a) - x, x - row(kHigh + a)), V::Broadcast(0)); };
        const Vec3<V> gaps = {gap(0, q[i].x), gap(1, q[i].y), gap(2, q[i].z)};
        const V lambda = row(kLambda);
        const Vec3<V> scaled = {lambda * gaps.x, lambda * gaps.y, lambda * gaps.z};
        const V most = Max(Max(row(kAxis) * gaps.x, row(kAxis + 1) * gaps.y), row(kAxis + 2) * gaps.z);
        (row(kBase) + Max(Dot(scaled, scaled), most * most)).Store(bounds[i] + l);
      }
    }
  }

  static void VisitGroup(Work& w, int level, int64_t group) {
    alignas(64) T bounds[kTogether][kFanOut];
    Bounds(w, w.nodes + (w.shape.first_group[level] + group) * kNodeRows * kFanOut, bounds);
    uint32_t left = 0;
    for (int i = 0; i < kTogether; ++i) {
      const V limit = V::Broadcast(w.candidates[i].bound + kUnderflow<T>);
      for (int l = 0; l < kFanOut; l += V::kLanes) left |= LessEqualMask(V::Load(bounds[i] + l), limit) << l;
    }
    const int64_t nodes = w.shape.NodesIn(level, group);
    if (nodes < kFanOut) left &= (uint32_t{1} << nodes) - 1;
    if (level == 0) left &= ~w.SeedsIn(group);
    for (; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      const int64_t node = group * kFanOut + lane;
      if (level > 0) {
        VisitGroup(w, level - 1, node);
      } else {
        bool within = false;
        for (int i = 0; i < kTogether; ++i) within |= bounds[i][lane] <= w.candidates[i].bound + kUnderflow<T>;
        if (within) VisitLeaf(w, static_cast<int32_t>(node));
      }
    }
  }

  // Fills slots from `n` on: points at +inf, then at NaN, then −1.
  static void Rest(const Search<T>& s, int64_t b, Vec3<T> q, int64_t n, int32_t* idxs) {
    const T* p = At(s.p, s.batch, b);
    const T* sigma = kAnisotropic ? At(s.sigma, s.batch, b) : nullptr;
    const T* R = kAnisotropic ? At(s.R, s.batch, b) : nullptr;
    const int64_t length = LengthOf(s.lengths, s.batch, b, s.P);
    for (int pass = 0; pass < 2 && n < Min(s.K, length); ++pass) {
      for (int64_t j = 0; j < length && n < s.K; ++j) {
        const T dist = Metric<T>::Distance(
            Metric<T>::Load(kAnisotropic ? sigma + 3 * j : nullptr, kAnisotropic ? R + 9 * j : nullptr),
            q - Load3(p + 3 * j));
        if (pass == 0 ? dist > kMax : dist != dist) idxs[n++] = static_cast<int32_t>(j);
      }
    }
    while (n < s.K) idxs[n++] = -1;
  }

  static void Run(const Search<T>& s, void* scratch, int64_t task) {
    Work w;
    w.shape = ShapeOfIndex(s.P);
    w.K = s.K;
    w.capacity = Capacity(s);
    char* memory = static_cast<char*>(scratch) + KeyBytes(s) + task * CandidateBytes(s);
    const int64_t row = w.capacity + kRun;
    T* dist = reinterpret_cast<T*>(memory);
    int32_t* place = reinterpret_cast<int32_t*>(dist + (kTogether + 1) * row);
    for (int i = 0; i < kTogether; ++i) w.candidates[i] = {{dist + i * row, place + i * row}, 0, 0, 0};
    w.spare = {dist + kTogether * row, place + kTogether * row};
    const int64_t packets = Packets(s), total = Count(s.batch) * packets, tasks = Tasks(s);
    int64_t last_b = -1;
    for (int64_t n = total * task / tasks; n < total * (task + 1) / tasks; ++n) {
      const int64_t b = n / packets, first = n % packets * kTogether;
      if (b != last_b) {
        w.leaves = At(s.index.leaves, s.batch, b);
        w.order = At(s.index.order, s.batch, b);
        w.nodes = At(s.index.nodes, s.batch, b);
        w.length = LengthOf(s.lengths, s.batch, b, s.P);
        w.candidates[kTogether - 1].n = 0;
        last_b = b;
      }
      const uint64_t* keys = Keys(s, scratch, b);
      const T* q = At(s.q, s.batch, b);
      int32_t* idxs = s.idxs + b * s.Q * s.K;
      const auto query = [&](int64_t i) { return static_cast<int64_t>(static_cast<uint32_t>(keys[Min(i, s.Q - 1)])); };
      for (int i = 0; i < kTogether; ++i) {
        w.q[i] = Load3(q + 3 * query(first + i));
        const auto finite = [](T x) { return x < kMax ? (x > -kMax ? x : -kMax) : kMax; };
        w.finite_q[i] = {finite(w.q[i].x), finite(w.q[i].y), finite(w.q[i].z)};
        const int64_t ahead = query(first + kTogether + i);
        __builtin_prefetch(q + 3 * ahead);
        __builtin_prefetch(idxs + ahead * s.K, 1);
      }
      VisitSeeds(w, w.candidates[kTogether - 1]);
      VisitGroup(w, w.shape.levels - 1, 0);
      for (int i = 0; i < Min(kTogether, s.Q - first); ++i) {
        w.CompactOf(i);
        const Candidates<T>& c = w.candidates[i];
        int32_t* row = idxs + query(first + i) * s.K;
        for (int64_t k = 0; k < c.n; ++k) row[k] = w.order[c.place[k]];
        if (c.n < s.K) Rest(s, b, w.q[i], c.n, row);
      }
    }
  }

  static constexpr CpuKernel<Search<T>> kKernel = {&ScratchBytes, {{&SortTasks, &SortQueries}, {&Tasks, &Run}}};
};

}  // namespace

template <class T>
CpuKernel<Search<T>> SearchKernel(MetricKind metric) {
  return metric == MetricKind::kAnisotropic ? Searcher<T, Anisotropic>::kKernel : Searcher<T, Isotropic>::kKernel;
}

template CpuKernel<Search<float>> SearchKernel<float>(MetricKind metric);
template CpuKernel<Search<double>> SearchKernel<double>(MetricKind metric);

}  // namespace knn::KNN_ISA
