// The search on CPUs: brute force.
//
// Phase 1 packs the points of each distinct cloud into groups, in structure-of-arrays form. Phase 2 takes the queries,
// a few at a time, through the points in chunks that stay in cache. For each query and chunk it
//
//   1. computes all distances without a branch, and the minimum of every four points' (the metric's code, with a SIMD
//      vector for its scalar);
//   2. if it has no bound yet, finds one in the minima: were K of them at most x, so were the K nearest distances. With
//      minima of many small groups this is tight, so that hardly more than K points will be looked at;
//   3. goes through the minima and appends the points within the bound to the query's candidates, in index order. When
//      these no longer fit, all but the K nearest are dropped and the bound becomes the K-th's distance.
//
// Distances of +inf and NaN are never candidates; the rare query that needs them looks for them in the end.

#include "search/cpu.h"

#include <cfloat>

#include "common/simd.h"

namespace knn::KNN_ISA {
namespace {

constexpr int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct Limits;
template <>
struct Limits<float> {
  using Key = int32_t;
  using UnsignedKey = uint32_t;
  static constexpr float kMax = FLT_MAX;
  static float Below(float x) { return ::nextafterf(x, -HUGE_VALF); }
};
template <>
struct Limits<double> {
  using Key = int64_t;
  using UnsignedKey = uint64_t;
  static constexpr double kMax = DBL_MAX;
  static double Below(double x) { return ::nextafter(x, -HUGE_VAL); }
};

// Integers in the order of the floating-point numbers, for bisection.
template <class T, class Key = typename Limits<T>::Key>
Key ToKey(T x) {
  Key key;
  std::memcpy(&key, &x, sizeof key);
  return key ^ ((key >> (8 * sizeof key - 1)) & ~(Key(1) << (8 * sizeof key - 1)));
}
template <class T, class Key = typename Limits<T>::Key>
T FromKey(Key key) {
  key ^= (key >> (8 * sizeof key - 1)) & ~(Key(1) << (8 * sizeof key - 1));
  T x;
  std::memcpy(&x, &key, sizeof x);
  return x;
}

constexpr int kRun = 64;  // candidates sorted at a time, a bit of a word for each

// The nearest points found so far by one query. dist and idx are in index order where distances are equal.
template <class T>
struct Candidates {
  T* dist;       // [capacity]
  int32_t* idx;  // [capacity]
  int64_t n;
  T bound;  // points further away than this are not among the K nearest
};

// The first `n` (at most kRun) of (dist, idx), sorted by distance. Stable.
template <class T>
void SortRun(const T* dist, const int32_t* idx, int64_t n, T* dist_out, int32_t* idx_out) {
  using V = Vec<T>;
  const uint64_t exist = n == 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1;
  for (int64_t i = 0; i < n; ++i) {
    const V x = V::Broadcast(dist[i]);
    uint64_t at_most = 0, at_least = 0;
    for (int64_t j = 0; j < n; j += V::kLanes) {
      const V y = V::Load(dist + j);  // past n there is something, as runs are padded
      at_most |= static_cast<uint64_t>(LessEqualMask(y, x)) << j;
      at_least |= static_cast<uint64_t>(LessEqualMask(x, y)) << j;
    }
    const uint64_t before = (uint64_t(1) << i) - 1;
    const int rank = __builtin_popcountll(at_most & exist & (~at_least | before));
    dist_out[rank] = dist[i];
    idx_out[rank] = idx[i];
  }
}

// Sorts the candidates by (distance, index) and keeps at most K. `spare` is memory for twice as many.
template <class T>
void Compact(Candidates<T>& c, int64_t capacity, int64_t K, T* spare_dist, int32_t* spare_idx) {
  T *from = spare_dist, *to = spare_dist + capacity;
  int32_t *from_idx = spare_idx, *to_idx = spare_idx + capacity;
  for (int64_t i = 0; i < c.n; i += kRun) SortRun(c.dist + i, c.idx + i, Min(kRun, c.n - i), from + i, from_idx + i);
  for (int64_t width = kRun; width < c.n; width *= 2) {
    for (int64_t begin = 0; begin < c.n; begin += 2 * width) {
      const int64_t middle = Min(begin + width, c.n), end = Min(begin + 2 * width, c.n);
      for (int64_t i = begin, j = middle, k = begin; k < end; ++k) {
        const bool first = j == end || (i < middle && from[i] <= from[j]);
        const int64_t at = first ? i++ : j++;
        to[k] = from[at];
        to_idx[k] = from_idx[at];
      }
    }
    T* dist = from;
    from = to, to = dist;
    int32_t* idx = from_idx;
    from_idx = to_idx, to_idx = idx;
  }
  c.n = Min(c.n, K);
  std::memcpy(c.dist, from, c.n * sizeof(T));
  std::memcpy(c.idx, from_idx, c.n * sizeof(int32_t));
  // Points still to come have larger indices: at the K-th's distance they would come after it.
  if (c.n == K) c.bound = Limits<T>::Below(c.dist[K - 1]);
}

// A number that at least K of the `n` minima of disjoint groups of points do not exceed, nearly the smallest.
template <class T>
T FindBound(const T* minima, int64_t n, int64_t K) {
  using V = Vec<T>;
  using Key = typename Limits<T>::Key;
  using UnsignedKey = typename Limits<T>::UnsignedKey;
  // Minima of larger groups are fewer to count. With four times K the K-th of them is about the 1.15 K-th distance.
  constexpr int64_t kMost = 1024;
  const int64_t m = Min(Min(Ceil(4 * K, 64) * 64, kMost), n);
  if (m < 2 * K) return Limits<T>::kMax;
  alignas(64) T folded[kMost];
  V lows = V::Broadcast(HUGE_VAL), highs = lows;  // highs are negated
  for (int64_t i = 0; i < m; i += V::kLanes) {
    V x = V::Load(minima + i);
    for (int64_t j = i + m; j < n; j += m) x = Min(V::Load(minima + j), x);
    x.Store(folded + i);
    lows = Min(x, lows);
    highs = Min(V::Broadcast(0) - x, highs);
  }
  T least = HUGE_VAL, largest = -HUGE_VAL;
  for (int l = 0; l < V::kLanes; ++l) {
    least = lows.v[l] < least ? lows.v[l] : least;
    largest = -highs.v[l] > largest ? -highs.v[l] : largest;
  }
  const auto count = [&](T x) {
    int64_t found = 0;
    for (int64_t i = 0; i < m; i += V::kLanes) {
      found += __builtin_popcount(LessEqualMask(V::Load(folded + i), V::Broadcast(x)));
    }
    return found;
  };
  if (!(largest <= Limits<T>::kMax)) largest = Limits<T>::kMax;
  if (count(largest) < K) return Limits<T>::kMax;
  Key low = ToKey(least), high = ToKey(largest);
  for (int step = 0; step < 12 && low < high; ++step) {
    const Key middle = low + static_cast<Key>((static_cast<UnsignedKey>(high) - static_cast<UnsignedKey>(low)) / 2);
    const int64_t found = count(FromKey<T>(middle));
    if (found < K) {
      low = middle + 1;
    } else {
      high = middle;
      if (found <= K + K / 8) break;
    }
  }
  return FromKey<T>(high);
}

template <class T, template <class> class Metric>
struct Searcher {
  using V = Vec<T>;
  static constexpr bool kAnisotropic = Metric<T>::kKind == MetricKind::kAnisotropic;

  // A group is kVectors vectors of points, packed as [component][vector][lane]. Neighbouring points are in the same
  // lane of its vectors: who finds the minimum over these and goes through lanes meets points in index order.
  static constexpr int64_t kComponents = kAnisotropic ? 15 : 3;
  static constexpr int64_t kVectors = 4;
  static constexpr int64_t kGroup = kVectors * V::kLanes;
  static constexpr int64_t kChunk = (16 << 10) / sizeof(T);  // points whose distances are looked at together
  // Rows of distances and minima stand a line further apart than a power of two, which the cache likes better.
  static constexpr int64_t kRow = kChunk + 64 / sizeof(T), kMinimaRow = kChunk / kVectors + 64 / sizeof(T);
  static constexpr int64_t kTogether = 4;  // queries that share loads of points

  // A sweep is the queries that share a chunk while it is in cache. A task does many, one after another, with the same
  // memory for candidates.
  static int64_t Sweep(const Search<T>& s) { return s.P > kChunk && s.K <= 128 ? 32 : kTogether; }
  static int64_t Sweeps(const Search<T>& s) { return Ceil(s.Q, Sweep(s)); }
  static int64_t Capacity(const Search<T>& s) { return Ceil(Min(2 * s.K, s.P) + 64, 64) * 64; }
  static int64_t CandidateBytes(const Search<T>& s) {
    return (Sweep(s) + 2) * Capacity(s) * (sizeof(T) + sizeof(int32_t));
  }

  // Clouds: the batch entries whose points differ.
  static Batch Clouds(const Search<T>& s) {
    Batch clouds = s.batch;
    for (int a = 0; a < clouds.ndim; ++a) {
      const bool shared = s.p.stride[a] == 0 && s.lengths.stride[a] == 0 &&
                          (!kAnisotropic || (s.sigma.stride[a] == 0 && s.R.stride[a] == 0));
      if (shared) clouds.size[a] = Min(1, clouds.size[a]);
    }
    return clouds;
  }
  static int64_t CloudOf(const Search<T>& s, int64_t b) {
    const Batch clouds = Clouds(s);
    int64_t cloud = 0, stride = 1;
    for (int a = s.batch.ndim - 1; a >= 0; --a) {
      if (clouds.size[a] > 1) cloud += b % s.batch.size[a] * stride;
      stride *= clouds.size[a];
      b /= s.batch.size[a];
    }
    return cloud;
  }
  static int64_t Groups(const Search<T>& s) { return Ceil(s.P, kGroup); }
  static int64_t CloudBytes(const Search<T>& s) { return Groups(s) * kGroup * kComponents * sizeof(T); }
  static T* Packed(const Search<T>& s, void* scratch, int64_t cloud) {
    return reinterpret_cast<T*>(static_cast<char*>(scratch) + cloud * CloudBytes(s));
  }

  static int64_t ScratchBytes(const Search<T>& s) {
    return Count(Clouds(s)) * CloudBytes(s) + Tasks(s) * CandidateBytes(s);
  }

  // Phase 1.

  static constexpr int64_t kGroupsPerTask = 16;
  static int64_t PackTasks(const Search<T>& s) { return Count(Clouds(s)) * Ceil(Groups(s), kGroupsPerTask); }

  static int64_t Length(const Search<T>& s, const Batch& batch, int64_t b) {
    const int64_t length = *At(s.lengths, batch, b);
    return length < 0 ? 0 : Min(length, s.P);
  }

  static void Pack(const Search<T>& s, void* scratch, int64_t task) {
    const int64_t tasks = Ceil(Groups(s), kGroupsPerTask), cloud = task / tasks;
    const int64_t begin = task % tasks * kGroupsPerTask, end = Min(begin + kGroupsPerTask, Groups(s));
    const Batch clouds = Clouds(s);
    const T* p = At(s.p, clouds, cloud);
    const T* sigma = kAnisotropic ? At(s.sigma, clouds, cloud) : nullptr;
    const T* R = kAnisotropic ? At(s.R, clouds, cloud) : nullptr;
    const int64_t length = Length(s, clouds, cloud);
    for (int64_t g = begin; g < end; ++g) {
      T* group = Packed(s, scratch, cloud) + g * kGroup * kComponents;
      for (int64_t i = 0; i < kGroup; ++i) {
        const int64_t j = g * kGroup + i;
        T* out = group + i % kVectors * V::kLanes + i / kVectors;
        if (j >= length) {  // a NaN is nobody's neighbour
          for (int64_t c = 0; c < kComponents; ++c) out[c * kGroup] = NAN;
          continue;
        }
        for (int c = 0; c < 3; ++c) out[c * kGroup] = p[3 * j + c];
        if constexpr (kAnisotropic) {
          for (int c = 0; c < 3; ++c) out[(3 + c) * kGroup] = sigma[3 * j + c];
          for (int c = 0; c < 9; ++c) out[(6 + c) * kGroup] = R[9 * j + c];
        }
      }
    }
  }

  // Phase 2.

  static int64_t Tasks(const Search<T>& s) {
    constexpr int64_t kMost = 256, kMostBytes = 64 << 20;
    const int64_t fit = kMostBytes / CandidateBytes(s);
    return Min(Count(s.batch) * Sweeps(s), fit < 1 ? 1 : Min(fit, kMost));
  }

  static typename Metric<V>::Parameters LoadParameters(const T* group) {
    if constexpr (kAnisotropic) {
      const auto load = [&](int c) { return V::Load(group + c * kGroup); };
      return {{load(3), load(4), load(5)},
              {{{load(6), load(7), load(8)}, {load(9), load(10), load(11)}, {load(12), load(13), load(14)}}}};
    } else {
      return {V::Broadcast(0)};  // sigma, which the distance does not depend on
    }
  }

  // Distances of N queries to all points in `groups` groups.
  template <int N>
  static void Distances(const T* group, int64_t groups, const T* const* q, T* dists /*[N, kRow]*/,
                        T* minima /*[N, kMinimaRow]*/) {
    Vec3<V> queries[N];
    for (int i = 0; i < N; ++i) {
      queries[i] = {V::Broadcast(q[i][0]), V::Broadcast(q[i][1]), V::Broadcast(q[i][2])};
    }
    for (int64_t g = 0; g < groups; ++g, group += kComponents * kGroup) {
      V minimum[N];
      for (int i = 0; i < N; ++i) minimum[i] = V::Broadcast(HUGE_VAL);
      for (int v = 0; v < kVectors; ++v) {
        const T* at = group + v * V::kLanes;
        const Vec3<V> p = {V::Load(at), V::Load(at + kGroup), V::Load(at + 2 * kGroup)};
        const auto m = LoadParameters(at);
        for (int i = 0; i < N; ++i) {
          const V dist = Metric<V>::Distance(m, queries[i] - p);
          dist.Store(dists + i * kRow + g * kGroup + v * V::kLanes);
          minimum[i] = Min(dist, minimum[i]);
        }
      }
      for (int i = 0; i < N; ++i) minimum[i].Store(minima + i * kMinimaRow + g * V::kLanes);
    }
  }

  // Memory of one task.
  struct Work {
    T* packed;
    int64_t length, capacity;
    Candidates<T> candidates[32];
    T* spare_dist;
    int32_t* spare_idx;
    alignas(64) T dists[kTogether * kRow];
    alignas(64) T minima[kTogether * kMinimaRow];
  };

  static void Take(const T* dists, const T* minima, int64_t groups, int64_t first_point, int64_t K, Work& work,
                   Candidates<T>& c) {
    if (c.bound == Limits<T>::kMax) c.bound = FindBound(minima, groups * V::kLanes, K);
    // Lanes of minima within the bound. Most words have few: storing kUsual unasked spares branches that would be
    // mispredicted, and what is stored in excess is overwritten.
    constexpr int kUsual = 3;
    uint16_t hits[kChunk / kVectors + kUsual];
    int64_t num_hits = 0;
    for (int64_t i = 0; i < groups * V::kLanes; i += 64) {
      uint64_t word = 0;
      for (int l = 0; l < 64 && i + l < groups * V::kLanes; l += V::kLanes) {
        word |= static_cast<uint64_t>(LessEqualMask(V::Load(minima + i + l), V::Broadcast(c.bound))) << l;
      }
      const int64_t num = num_hits + __builtin_popcountll(word);
      const auto store = [&] {
        hits[num_hits++] = static_cast<uint16_t>(i + (word == 0 ? 0 : __builtin_ctzll(word)));
        word &= word - 1;
      };
      for (int l = 0; l < kUsual; ++l) store();
      while (word != 0) store();
      num_hits = num;
    }
    int64_t n = c.n;
    T bound = c.bound;
    for (int64_t h = 0; h < num_hits; ++h) {
      if (n + kVectors > work.capacity) {
        c.n = n;
        Compact(c, work.capacity, K, work.spare_dist, work.spare_idx);
        n = c.n;
        bound = c.bound;
      }
      const int64_t group = hits[h] / V::kLanes * kGroup, lane = hits[h] % V::kLanes;
      for (int v = 0; v < kVectors; ++v) {  // writes all, counts what is within
        const T dist = dists[group + v * V::kLanes + lane];
        c.dist[n] = dist;
        c.idx[n] = static_cast<int32_t>(first_point + group + lane * kVectors + v);
        n += dist <= bound;
      }
    }
    c.n = n;
  }

  // Fills slots from `n` on: points at +inf, then at NaN, then −1.
  static void Rest(const T* q, int64_t n, int64_t K, Work& work, int32_t* idxs) {
    for (int pass = 0; pass < 2 && n < Min(K, work.length); ++pass) {
      for (int64_t first = 0; first < work.length; first += kChunk) {
        const int64_t points = Min(kChunk, work.length - first);
        Distances<1>(work.packed + first * kComponents, Ceil(points, kGroup), &q, work.dists, work.minima);
        for (int64_t i = 0; i < points && n < K; ++i) {
          const T dist = work.dists[i / kGroup * kGroup + i % kVectors * V::kLanes + i % kGroup / kVectors];
          if (pass == 0 ? dist > Limits<T>::kMax : dist != dist) idxs[n++] = static_cast<int32_t>(first + i);
        }
      }
    }
    while (n < K) idxs[n++] = -1;
  }

  static void DoSweep(const Search<T>& s, const T* q, int64_t queries, Work& work, int32_t* idxs) {
    for (int64_t i = 0; i < queries; ++i) {
      work.candidates[i].n = 0;
      work.candidates[i].bound = Limits<T>::kMax;
    }
    for (int64_t first = 0; first < work.length; first += kChunk) {
      const int64_t groups = Ceil(Min(kChunk, work.length - first), kGroup);
      const T* packed = work.packed + first * kComponents;
      for (int64_t i = 0; i < queries; i += kTogether) {
        const T* at[kTogether];
        for (int k = 0; k < kTogether; ++k) at[k] = q + 3 * Min(i + k, queries - 1);
        if (i + 1 == queries) {
          Distances<1>(packed, groups, at, work.dists, work.minima);
        } else {
          Distances<kTogether>(packed, groups, at, work.dists, work.minima);
        }
        for (int64_t k = 0; k < Min(kTogether, queries - i); ++k) {
          Take(work.dists + k * kRow, work.minima + k * kMinimaRow, groups, first, s.K, work, work.candidates[i + k]);
        }
      }
    }
    for (int64_t i = 0; i < queries; ++i) {
      Candidates<T>& c = work.candidates[i];
      Compact(c, work.capacity, s.K, work.spare_dist, work.spare_idx);
      std::memcpy(idxs + i * s.K, c.idx, c.n * sizeof(int32_t));
      if (c.n < s.K) Rest(q + 3 * i, c.n, s.K, work, idxs + i * s.K);
    }
  }

  static void Run(const Search<T>& s, void* scratch, int64_t task) {
    const int64_t sweep = Sweep(s), sweeps = Count(s.batch) * Sweeps(s), tasks = Tasks(s);
    Work work;
    work.capacity = Capacity(s);
    char* memory = static_cast<char*>(scratch) + Count(Clouds(s)) * CloudBytes(s) + task * CandidateBytes(s);
    T* dist = reinterpret_cast<T*>(memory);
    int32_t* idx = reinterpret_cast<int32_t*>(dist + (sweep + 2) * work.capacity);
    for (int64_t i = 0; i < sweep; ++i) work.candidates[i] = {dist + i * work.capacity, idx + i * work.capacity, 0, 0};
    work.spare_dist = dist + sweep * work.capacity;
    work.spare_idx = idx + sweep * work.capacity;
    for (int64_t i = sweeps * task / tasks; i < sweeps * (task + 1) / tasks; ++i) {
      const int64_t b = i / Sweeps(s), first = i % Sweeps(s) * sweep;
      work.packed = Packed(s, scratch, CloudOf(s, b));
      work.length = Length(s, s.batch, b);
      DoSweep(s, At(s.q, s.batch, b) + 3 * first, Min(sweep, s.Q - first), work, s.idxs + (b * s.Q + first) * s.K);
    }
  }

  static constexpr CpuKernel<Search<T>> kKernel = {&ScratchBytes, {{&PackTasks, &Pack}, {&Tasks, &Run}}};
};

}  // namespace

template <class T>
CpuKernel<Search<T>> SearchKernel(MetricKind metric) {
  return metric == MetricKind::kAnisotropic ? Searcher<T, Anisotropic>::kKernel : Searcher<T, Isotropic>::kKernel;
}

template CpuKernel<Search<float>> SearchKernel<float>(MetricKind metric);
template CpuKernel<Search<double>> SearchKernel<double>(MetricKind metric);

}  // namespace knn::KNN_ISA
