// The hash grid on CUDA.
//
// Two neighbouring lanes share a point, one for the corners on either side along axis 0: their rows are neighbours
// where rows are numbered, and mostly where they are hashed (the prime of axis 0 is 1), so that both are in one sector
// of 32 bytes, which is what caches and memory are accessed by.
//
// Features and gradients in x: two lanes go through a few neighbouring levels, all corners of a level in flight at a
// time. Blocks go through the points for one such group of levels after another, so that the rows that are touched at a
// time fit the L2 cache. What each group adds to a gradient in x is summed last, in their order.
//
// Gradients in the table: many points add to a row, in no order. So they add whole numbers, multiples of a step that is
// found from the largest of them, and the same sum comes out in any order. A step is so small that what is lost is far
// below the rounding of floats. What is not finite has no such number: a second pass writes NaN where it belongs, which
// seldom has anything to do.

#include <math_constants.h>

#include <cmath>
#include <type_traits>

#include "common/cuda.cuh"
#include "hash_grid/cuda.h"
#include "hash_grid/formulas.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kThreads = 256;

// Features: two at a time, or one where a level has one.
template <class T>
struct Pair {
  T a, b;
};

// As they are stored. Loaded before they are converted, so that many are on their way.
template <class T>
using RawPair = std::conditional_t<sizeof(T) == 4, uint2, double2>;

template <class T>
__device__ __forceinline__ RawPair<T> Load(const T* features, int64_t i, Stored stored, bool single) {
  if constexpr (sizeof(T) == 8) {
    return single ? make_double2(features[i], 0) : *reinterpret_cast<const double2*>(features + i);
  } else if (stored == Stored::whole) {
    return single ? make_uint2(__float_as_uint(features[i]), 0) : *reinterpret_cast<const uint2*>(features + i);
  } else {
    const auto* halves = reinterpret_cast<const uint16_t*>(features) + i;
    return make_uint2(single ? *halves : *reinterpret_cast<const uint32_t*>(halves), 0);
  }
}

template <class T>
__device__ __forceinline__ Pair<T> Converted(RawPair<T> raw, Stored stored) {
  if constexpr (sizeof(T) == 8) {
    return {raw.x, raw.y};
  } else {
    const uint16_t low = static_cast<uint16_t>(raw.x), high = static_cast<uint16_t>(raw.x >> 16);
    if (stored == Stored::bfloat16) return {Widen(BFloat16{low}), Widen(BFloat16{high})};
    if (stored == Stored::half) return {Widen(Half{low}), Widen(Half{high})};
    return {__uint_as_float(raw.x), __uint_as_float(raw.y)};
  }
}

template <class T>
__device__ __forceinline__ void Store(T x, T* features, int64_t i, Stored stored) {
  if (sizeof(T) == 8 || stored == Stored::whole) {
    features[i] = x;
  } else if (stored == Stored::bfloat16) {
    Narrow(static_cast<float>(x), reinterpret_cast<BFloat16*>(features) + i);
  } else {
    Narrow(static_cast<float>(x), reinterpret_cast<Half*>(features) + i);
  }
}

template <class T>
__device__ __forceinline__ void Store(Pair<T> x, T* features, int64_t i, Stored stored, bool single) {
  if (single) {
    Store(x.a, features, i, stored);
  } else if constexpr (sizeof(T) == 8) {
    *reinterpret_cast<double2*>(features + i) = make_double2(x.a, x.b);
  } else if (stored == Stored::whole) {
    *reinterpret_cast<float2*>(features + i) = make_float2(x.a, x.b);
  } else {
    uint16_t bits[2];
    if (stored == Stored::bfloat16) {
      BFloat16 a, b;
      Narrow(x.a, &a), Narrow(x.b, &b);
      bits[0] = a.bits, bits[1] = b.bits;
    } else {
      Half a, b;
      Narrow(x.a, &a), Narrow(x.b, &b);
      bits[0] = a.bits, bits[1] = b.bits;
    }
    *reinterpret_cast<uint32_t*>(reinterpret_cast<uint16_t*>(features) + i) = bits[0] | uint32_t{bits[1]} << 16;
  }
}

// An array of batch entry b whose elements are stored in 16 bits, unless they are whole.
template <class T>
__device__ __forceinline__ const T* FeaturesAt(const Operand<const T>& operand, const Batch& batch, int64_t b,
                                               Stored stored) {
  if (operand.data == nullptr) return nullptr;
  const int64_t i = At(operand, batch, b) - operand.data;
  return stored == Stored::whole ? operand.data + i
                                 : reinterpret_cast<const T*>(reinterpret_cast<const uint16_t*>(operand.data) + i);
}

// Of a power of two, as numbers of features are.
__device__ __forceinline__ int Log2(int x) { return 31 - __clz(x); }

template <class N, class T>
__device__ __forceinline__ N Joined(T value, T tangent) {
  if constexpr (std::is_same_v<N, T>) {
    return value;
  } else {
    return {value, tangent};
  }
}

// What a batch entry has for its points; null for what is not given.
template <class T, class N>
struct Entry {
  static constexpr bool kDual = !std::is_same_v<N, T>;
  const T *x, *v, *weights, *ct, *ct_moves;

  __device__ __forceinline__ Entry(const HashGrid<T, T>& grid, int64_t b)
      : x(At(grid.x.value, grid.batch, b)),
        v(kDual ? AtOrNull(grid.x.tangent, grid.batch, b) : nullptr),
        weights(At(grid.weights, grid.batch, b)),
        ct(FeaturesAt(grid.ct.value, grid.batch, b, grid.stored)),
        ct_moves(kDual ? FeaturesAt(grid.ct.tangent, grid.batch, b, grid.stored) : nullptr) {}
};

// A point, and its tangent.
template <class T, class N, int D>
struct Point {
  T x[D], v[D];
  bool reaches = true;

  __device__ __forceinline__ Point(const HashGrid<T, T>& grid, const Entry<T, N>& entry, int64_t i) {
#pragma unroll
    for (int d = 0; d < D; ++d) {
      x[d] = entry.x[i * D + d];
      v[d] = entry.v == nullptr ? T(0) : entry.v[i * D + d];
      reaches &= Reaches(x[d], grid.most_scale);
    }
  }

  // Where it lies at a level: rows of the corners on the given side along axis 0. A point that does not reach the grid
  // gets some rows too.
  __device__ __forceinline__ void Find(const HashGrid<T, T>& grid, const Level& level, int side, Sides<N> (&sides)[D],
                                       uint32_t (&cell)[D], uint32_t (&row)[1 << (D - 1)]) const {
    const T scale = static_cast<T>(level.scale);
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const Place<T> place = PlaceOf(x[d], scale);
      cell[d] = place.cell;
      sides[d] = SidesOf(grid.interpolation, Joined<N>(place.fraction, scale * v[d]), scale);
    }
    cell[0] += side;
    FindRows<D, 1>(level, cell, row);
  }
};

// The features of corners, in pairs; zero but for the first where only that is wanted. Derivatives of "nearest", which
// is linear in them, do not meet their values.
template <class T, class N, int D>
__device__ __forceinline__ void LoadCorners(const HashGrid<T, T>& grid, const T* table, const T* moves, int64_t first,
                                            int side, const uint32_t (&row)[1 << (D - 1)], int k, N (&a)[1 << (D - 1)],
                                            N (&b)[1 << (D - 1)]) {
  constexpr int kCorners = 1 << (D - 1);
  constexpr bool kDual = !std::is_same_v<N, T>;
  const bool single = grid.features == 1, nearest = grid.interpolation == Interpolation::nearest;
  const int F = grid.features, corners = !nearest ? kCorners : side == 0 ? 1 : 0;
  const uint64_t begin = first * F + k;
  const auto place = [&](int c) { return begin + uint64_t{row[c]} * static_cast<uint32_t>(F); };
  RawPair<T> raw[kCorners] = {}, raw_moves[kDual ? kCorners : 1] = {};
#pragma unroll
  for (int c = 0; c < kCorners; ++c) {
    if (c < (kDual && nearest ? 0 : corners)) raw[c] = Load(table, place(c), grid.stored, single);
  }
  if (kDual && moves != nullptr) {
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
      if (c < corners) raw_moves[kDual ? c : 0] = Load(moves, place(c), grid.stored, single);
    }
  }
#pragma unroll
  for (int c = 0; c < kCorners; ++c) {
    const Pair<T> value = Converted<T>(raw[c], grid.stored);
    const Pair<T> tangent = Converted<T>(raw_moves[kDual ? c : 0], grid.stored);
    a[c] = Joined<N>(value.a, tangent.a);
    b[c] = Joined<N>(value.b, tangent.b);
  }
}

template <class T>
__device__ __forceinline__ T NaN() {
  return static_cast<T>(CUDART_NAN_F);
}

// Of all lanes' pairs, that of `lane`.
template <class T>
__device__ __forceinline__ Pair<T> FromLane(Pair<T> pair, int lane) {
  return {__shfl_sync(kFullMask, pair.a, lane), __shfl_sync(kFullMask, pair.b, lane)};
}
template <class T>
__device__ __forceinline__ T SumOfTwo(T x) {
  return x + __shfl_xor_sync(kFullMask, x, 1);
}

// A lane's half of the pairs that its two lanes go through, of features or their cotangents.
template <class T>
struct HalfOfPairs {
  static constexpr int kHalf = kPairsOfThread / 2;
  Pair<T> pair[kHalf];

  // Whether a half can be read and written by 16 bytes, if there are all pairs.
  static __device__ __forceinline__ bool Whole(const HashGrid<T, T>& grid) {
    return grid.stored == Stored::whole && grid.features > 1 && grid.levels * grid.features % 4 == 0;
  }

  // `at`: where the first pair of the two lanes lies; of `count` pairs.
  __device__ __forceinline__ void Read(const T* features, int64_t at, int count, const HashGrid<T, T>& grid) {
    const Stored stored = grid.stored;
    const bool single = grid.features == 1;
    if constexpr (sizeof(T) == 4) {
      if (features != nullptr && count == kPairsOfThread && Whole(grid)) {
        const float4 half = *reinterpret_cast<const float4*>(features + at + (threadIdx.x & 1) * 4);
        pair[0] = {half.x, half.y}, pair[1] = {half.z, half.w};
        return;
      }
    }
#pragma unroll
    for (int n = 0; n < kHalf; ++n) {
      const int s = (threadIdx.x & 1) * kHalf + n;
      pair[n] = {};
      if (features != nullptr && s < count) {
        pair[n] = Converted<T>(Load(features, at + (single ? s : 2 * s), stored, single), stored);
      }
    }
  }
  __device__ __forceinline__ void Write(T* features, int64_t at, int count, const HashGrid<T, T>& grid) const {
    const Stored stored = grid.stored;
    const bool single = grid.features == 1;
    if constexpr (sizeof(T) == 4) {
      if (count == kPairsOfThread && Whole(grid)) {
        *reinterpret_cast<float4*>(features + at + (threadIdx.x & 1) * 4) =
            make_float4(pair[0].a, pair[0].b, pair[1].a, pair[1].b);
        return;
      }
    }
#pragma unroll
    for (int n = 0; n < kHalf; ++n) {
      const int s = (threadIdx.x & 1) * kHalf + n;
      if (s < count) Store(pair[n], features, at + (single ? s : 2 * s), stored, single);
    }
  }
  // Pair s, whichever lane has it.
  __device__ __forceinline__ Pair<T> operator[](int s) const {
    Pair<T> mine = pair[0];
#pragma unroll
    for (int n = 1; n < kHalf; ++n) {
      if (s % kHalf == n) mine = pair[n];
    }
    return FromLane(mine, (threadIdx.x & (kWarp - 2)) + s / kHalf);
  }
  __device__ __forceinline__ void Set(int s, Pair<T> to) {
#pragma unroll
    for (int n = 0; n < kHalf; ++n) {
      if (s == static_cast<int>(threadIdx.x & 1) * kHalf + n) pair[n] = to;
    }
  }
};

// Features, and what a group of levels adds to the gradient in x, in `parts` [groups, batch·N, D], whichever is wanted.
// Two lanes have a point at the levels of a group.
template <class T, class N, int D, bool kWantsX>
__global__ void __launch_bounds__(kThreads, D == 4 || sizeof(T) == 8 ? 1
                                            : std::is_same_v<N, T>   ? 4
                                                                     : 3)
    Points(const __grid_constant__ HashGrid<T, T> grid, uint32_t blocks_of_group, T* parts) {
  constexpr int kCorners = 1 << (D - 1);
  const uint32_t group = blockIdx.x / blocks_of_group, size = static_cast<uint32_t>(grid.N);
  const uint32_t thread = (blockIdx.x - group * blocks_of_group) * kThreads + threadIdx.x;
  const uint32_t points = static_cast<uint32_t>(Count(grid.batch)) * size;
  const int side = thread & 1;
  const bool exists = thread / 2 < points;
  const uint32_t number = exists ? thread / 2 : 0, entry = number / size;  // lanes without a point have the first
  const int64_t b = entry, i = number - entry * size;
  const int F = grid.features, outputs = grid.levels * F, pairs = (F + 1) / 2, log2_pairs = Log2(pairs);
  const int begin = static_cast<int>(group) * LevelsOfThread(F),
            count = min(kPairsOfThread, (grid.levels - begin) * pairs);
  const bool single = F == 1, nearest = grid.interpolation == Interpolation::nearest;
  const bool wants_x = kWantsX && !nearest;

  const Entry<T, N> of(grid, b);
  const Point<T, N, D> point(grid, of, i);
  const T* table = FeaturesAt(grid.table.value, grid.batch, b, grid.stored);
  const T* moves = FeaturesAt(grid.table.tangent, grid.batch, b, grid.stored);
  const int64_t at = i * outputs + begin * F;
  HalfOfPairs<T> y, ct, ct_moves;
  ct.Read(of.ct, at, wants_x ? count : 0, grid);
  if constexpr (!std::is_same_v<N, T>) {
    ct_moves.Read(of.ct_moves, at, wants_x ? count : 0, grid);
  }
  Sides<N> sides[D];
  uint32_t cell[D], row[kCorners];
  N bar[D] = {};
#pragma unroll 1
  for (int s = 0; s < count; ++s) {
    const int l = begin + (s >> log2_pairs), k = (s & (pairs - 1)) * 2;
    const Level& level = grid.level[l];
    if (k == 0) point.Find(grid, level, side, sides, cell, row);
    const T m = of.weights[l];
    const N mine = nearest ? Constant<N>(T(1)) : side == 0 ? sides[0].lower : sides[0].upper;
    N features_a[kCorners], features_b[kCorners], u[kCorners], difference[D];
    LoadCorners<T, N, D>(grid, table, moves, level.first, side, row, k, features_a, features_b);
    if (wants_x) {
      const Pair<T> value = ct[s], tangent = std::is_same_v<N, T> ? Pair<T>{} : ct_moves[s];
      const N ct_a = m * Joined<N>(value.a, tangent.a), ct_b = m * Joined<N>(value.b, tangent.b);
#pragma unroll
      for (int c = 0; c < kCorners; ++c) {
        u[c] = ct_a * features_a[c];
        if (!single) u[c] = u[c] + ct_b * features_b[c];
      }
      const N sum = Interpolate<D, 1>(sides, u, difference);
      bar[0] = side == 0 ? bar[0] - sides[0].slope * sum : bar[0] + sides[0].slope * sum;
#pragma unroll
      for (int d = 1; d < D; ++d) bar[d] = bar[d] + sides[d].slope * (mine * difference[d]);
    }
    if (grid.y != nullptr) {
      const N a = nearest ? features_a[0] : Interpolate<D, 1>(sides, features_a, difference);
      const N b = nearest ? features_b[0] : Interpolate<D, 1>(sides, features_b, difference);
      y.Set(s, {m * SumOfTwo(Result(mine * a)), m * SumOfTwo(Result(mine * b))});
    }
  }
  if (grid.y != nullptr) {
    if (!point.reaches) {
#pragma unroll
      for (Pair<T>& pair : y.pair) pair = {NaN<T>(), NaN<T>()};
    }
    y.Write(grid.y, number * int64_t{outputs} + begin * F, exists ? count : 0, grid);
  }
  if constexpr (kWantsX) {
    T* out = parts + (group * int64_t{points} + number) * D;
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const T sum = SumOfTwo(Result(bar[d]));
      if (exists && side == (d & 1)) out[d] = point.reaches ? sum : NaN<T>();
    }
  }
}

template <class T>
__global__ void SumGroups(int64_t size, int groups, const T* parts, T* x_bar) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size) return;
  T sum = parts[i];
  for (int g = 1; g < groups; ++g) sum += parts[g * size + i];
  x_bar[i] = sum;
}

// ---- Gradients in the table.

// Of each unit (a level of one of the tables; see GroupEnd): the largest magnitude that a point adds, as the bits of a
// double, and whether something was not finite.
struct Unit {
  unsigned long long most;
  unsigned long long broken;
};
static_assert(sizeof(Unit) == kUnitBytes);

// 2^Exponent(most) times what is added is rounded to a whole number; headroom is the logarithm of how many times `most`
// a sum may be.
__device__ __forceinline__ int Exponent(unsigned long long most, int headroom) {
  const int above = static_cast<int>(most >> 52) - 1022;  // most < 2^above, unless it is subnormal
  return min(61 - headroom - max(above, -1021), 1000);
}
__device__ __forceinline__ double Power(int exponent) {
  return __longlong_as_double(static_cast<long long>(1023 + exponent) << 52);
}

struct Sums {
  int64_t points;          // that add to a table
  int headroom, low_bits;  // of the second limb, how many bits below the first's last
};

// Which point of those that add to table c is number p: its batch entry, and its place there.
template <class T>
struct Finder {
  SplitBatch split;
  uint32_t N;
  __device__ __forceinline__ void operator()(uint32_t c, uint32_t p, int64_t* b, int64_t* i) const {
    if (split.ndim == 0) {
      *b = 0, *i = p;
      return;
    }
    const uint32_t s = p / N;
    *b = Join(split, c, s);
    *i = p - s * N;
  }
};

constexpr int kRows = 8;  // of a block of Magnitudes, which is (kWarp, kRows)

// A lane has a pair of features at a time: blockIdx.y says which kWarp of them.
template <class T, bool kDual>
__global__ void __launch_bounds__(kWarp* kRows)
    Magnitudes(const __grid_constant__ HashGrid<T, T> grid, const __grid_constant__ Finder<T> find, Sums sums,
               uint32_t blocks_of_table, Unit* units) {
  const uint32_t c = blockIdx.x / blocks_of_table, first = blockIdx.x - c * blocks_of_table;
  const int F = grid.features, outputs = grid.levels * F, pairs = (F + 1) / 2;
  const bool single = F == 1;
  // Where they are fewer than lanes, a warp has several points at a time.
  const int all = grid.levels * pairs, wide = min(all, kWarp), together = kWarp / wide;
  const int of_point = threadIdx.x / wide, pair = blockIdx.y * kWarp + threadIdx.x - of_point * wide;
  const bool exists = of_point < together && pair < all;
  const int l = exists ? pair / pairs : 0;
  const double steepest = 1.5 * grid.dim * fabs(double{grid.level[l].scale});
  double most = 0;
  for (uint32_t p = (first * kRows + threadIdx.y) * together + of_point; exists && p < sums.points;
       p += blocks_of_table * kRows * together) {
    int64_t b, i;
    find(c, p, &b, &i);
    const T m = At(grid.weights, grid.batch, b)[l];
    const int64_t at = i * outputs + (single ? pair : 2 * pair);
    const T* ct = FeaturesAt(grid.ct.value, grid.batch, b, grid.stored);
    const Pair<T> value = Converted<T>(Load(ct, at, grid.stored, single), grid.stored);
    double bounds[2] = {fabs(m * value.a), fabs(m * value.b)};
    if constexpr (kDual) {
      // |Ẇ_b| ≤ Σ_d |a s'(f_d) ẋ_d| ≤ 3/2 D a max |ẋ_d|
      T fastest = 0;
      if (const T* v = AtOrNull(grid.x.tangent, grid.batch, b); v != nullptr) {
        for (int d = 0; d < grid.dim; ++d) fastest = fmax(fastest, fabs(v[i * grid.dim + d]));
      }
      double speed = steepest * fastest;
      Pair<T> tangent = {};
      if (const T* v = FeaturesAt(grid.ct.tangent, grid.batch, b, grid.stored); v != nullptr) {
        tangent = Converted<T>(Load(v, at, grid.stored, single), grid.stored);
      }
      if (grid.interpolation == Interpolation::nearest) bounds[0] = bounds[1] = speed = 0;
      bounds[0] = fma(bounds[0], speed, double{fabs(m * tangent.a)});
      bounds[1] = fma(bounds[1], speed, double{fabs(m * tangent.b)});
    }
#pragma unroll
    for (double bound : bounds) {
      if (bound <= Precision<double>::kMost) most = fmax(most, bound);
    }
  }
  __shared__ double most_of[kRows][kWarp];
  most_of[threadIdx.y][threadIdx.x] = most;
  __syncthreads();
  if (threadIdx.y == 0 && exists) {
    for (int r = 1; r < kRows; ++r) most = fmax(most, most_of[r][threadIdx.x]);
    if (most > 0) atomicMax(&units[int64_t{c} * grid.levels + l].most, __double_as_longlong(most));
  }
}

constexpr int kTurns = 4;  // of a thread of AddToTable, for a chunk of points at a level

// Lanes of a point at a level are numbered by side along axis 0 and feature, so that neighbouring ones add to
// neighbouring numbers. `sums_of` begins with the rows of unit `first_unit`. If `mark`, NaN is written instead where
// what would be added is not finite.
template <class T, class N, int D>
__global__ void __launch_bounds__(kThreads)
    AddToTable(const __grid_constant__ HashGrid<T, T> grid, const __grid_constant__ Finder<T> find, Sums sums,
               uint32_t chunks_of_unit, int64_t first_unit, int64_t end_unit, bool mark, Unit* units,
               unsigned long long* sums_of) {
  constexpr int kCorners = 1 << (D - 1);
  const int F = grid.features, outputs = grid.levels * F, log2_features = Log2(F);
  const int64_t first_row = first_unit / grid.levels * grid.rows + grid.level[first_unit % grid.levels].first;
  const int64_t chunks = (end_unit - first_unit) * chunks_of_unit;
  if (mark) {
    bool any = false;
    for (int64_t unit = first_unit + threadIdx.x; unit < end_unit; unit += kThreads) any |= units[unit].broken != 0;
    if (!__syncthreads_or(any)) return;
  }
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const uint32_t of_group = static_cast<uint32_t>(chunk / chunks_of_unit);
    const int64_t unit = first_unit + of_group;
    if (mark && units[unit].broken == 0) {  // on to the next unit
      chunk += ((of_group + 1) * int64_t{chunks_of_unit} - chunk - 1) / gridDim.x * gridDim.x;
      continue;
    }
    const uint32_t c = static_cast<uint32_t>(unit) / grid.levels, l = static_cast<uint32_t>(unit) - c * grid.levels;
    const Level& level = grid.level[l];
    const double power = Power(Exponent(units[unit].most, sums.headroom));
    const int64_t base = int64_t{c} * grid.rows + level.first - first_row;
    unsigned long long* const sums_of_level = sums_of + base * F * kLimbs<T>;
    bool broken = false;
    int64_t entry = 0;
    Entry<T, N> of(grid, entry);
#pragma unroll 1
    for (int turn = 0; turn < kTurns; ++turn) {
      const uint32_t piece = static_cast<uint32_t>(chunk - int64_t{of_group} * chunks_of_unit) * kTurns + turn;
      const uint32_t t = piece * kThreads + threadIdx.x, p = t >> (log2_features + 1);
      const int side = t >> log2_features & 1, k = t & (F - 1);
      const bool exists = p < sums.points;
      int64_t b, i;
      find(c, exists ? p : 0, &b, &i);
      if (b != entry) of = Entry<T, N>(grid, entry = b);
      const Point<T, N, D> point(grid, of, i);
      const bool adds = exists && point.reaches;
      Sides<N> sides[D];
      uint32_t cell[D], row[kCorners];
      N weight[kCorners];
      point.Find(grid, level, side, sides, cell, row);
      CornerWeights<D, 1>(sides, weight);
      int corners = kCorners;
      N mine = side == 0 ? sides[0].lower : sides[0].upper;
      const int64_t at = i * outputs + l * F + k;
      T value = Converted<T>(Load(of.ct, at, grid.stored, true), grid.stored).a;
      if (grid.interpolation == Interpolation::nearest) {
        corners = 1 - side;
        mine = weight[0] = Constant<N>(T(1));
        if (!std::is_same_v<N, T>) value = 0;  // derivatives of what is linear in it do not meet it
      }
      T tangent = 0;
      if (of.ct_moves != nullptr) tangent = Converted<T>(Load(of.ct_moves, at, grid.stored, true), grid.stored).a;
      const N bar = mine * (of.weights[l] * Joined<N>(value, tangent));
      if (mark) {
#pragma unroll
        for (int s = 0; s < kCorners; ++s) {
          const int64_t entry = (int64_t{c} * grid.rows + level.first + row[s]) * F + k;
          const bool finite = fabs(Result(weight[s] * bar)) <= Precision<T>::kMost;
          if (adds && s < corners && !finite) Store(NaN<T>(), grid.table_bar, entry, grid.stored);
        }
        continue;
      }
      // Where all points are in one cell, they are summed first: they would wait for each other.
      bool same = adds;
#pragma unroll
      for (int d = 0; d < D; ++d) same &= cell[d] == __shfl_sync(kFullMask, cell[d], d == 0 ? side * F : 0);
      const bool together = __all_sync(kFullMask, same);
#pragma unroll
      for (int s = 0; s < kCorners; ++s) {
        const T part = Result(weight[s] * bar);
        const bool finite = fabs(part) <= Precision<T>::kMost, counts = adds && s < corners;
        broken |= counts && !finite;
        const double scaled = counts && finite ? static_cast<double>(part) * power : 0.0;
        long long limb[kLimbs<T>];
        limb[0] = __double2ll_rn(scaled);
        if constexpr (kLimbs<T> == 2) {
          limb[1] = __double2ll_rn((scaled - static_cast<double>(limb[0])) * Power(sums.low_bits));
        }
#pragma unroll
        for (int n = 0; n < kLimbs<T>; ++n) {
          if (together) {
            for (int step = 2 * F; step < kWarp; step *= 2) limb[n] += __shfl_xor_sync(kFullMask, limb[n], step);
          }
          if (limb[n] == 0 || (together && (threadIdx.x & (kWarp - 1)) >= 2 * F)) continue;
          atomicAdd(sums_of_level + uint64_t{row[s]} * static_cast<uint32_t>(F * kLimbs<T>) + (k * kLimbs<T> + n),
                    static_cast<unsigned long long>(limb[n]));
        }
      }
    }
    if (broken) units[unit].broken = 1;
  }
}

// Sums of the units from first_unit on to floats; if `reset`, 0 is left for the next ones.
template <class T>
__global__ void __launch_bounds__(kThreads)
    Round(const __grid_constant__ HashGrid<T, T> grid, Sums sums, int64_t first_unit, bool reset, const Unit* units,
          long long* sums_of) {
  const int64_t unit = first_unit + blockIdx.y, c = unit / grid.levels;
  const Level& level = grid.level[unit % grid.levels];
  const int64_t first = (c * grid.rows + level.first) * grid.features;
  const int64_t before =
      (first_unit / grid.levels * grid.rows + grid.level[first_unit % grid.levels].first) * grid.features;
  const int exponent = Exponent(units[unit].most, sums.headroom);
  const double step = Power(-exponent);
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < level.rows * static_cast<int64_t>(grid.features);
       i += gridDim.x * kThreads) {
    long long* limb = sums_of + (first - before + i) * kLimbs<T>;
    double sum = static_cast<double>(limb[0]);
    if constexpr (kLimbs<T> == 2) sum += static_cast<double>(limb[1]) * Power(-sums.low_bits);
    Store(static_cast<T>(sum * step), grid.table_bar, first + i, grid.stored);
    if (reset) {
      for (int n = 0; n < kLimbs<T>; ++n) limb[n] = 0;
    }
  }
}

int CeilLog2(double x) {
  int exponent;
  return std::frexp(x, &exponent) == 0.5 ? exponent - 1 : exponent;
}

template <class T, class N, int D>
cudaError_t AddAll(const HashGrid<T, T>& grid, Unit* units, int64_t bytes, cudaStream_t stream) {
  const int64_t tables = Count(grid.table_batch), count = tables * grid.levels;
  if (tables * grid.rows == 0) return cudaSuccess;
  const Finder<T> find = {Split(grid.batch, grid.table_batch), static_cast<uint32_t>(Max(1, grid.N))};
  Sums sums = {};
  sums.points = Count(grid.batch) * grid.N / tables;
  const size_t feature_bytes = grid.stored == Stored::whole ? sizeof(T) : 2;
  if (sums.points == 0) {
    return cudaMemsetAsync(grid.table_bar, 0, tables * grid.rows * grid.features * feature_bytes, stream);
  }
  // Σ_b W_b = 1, and Σ_b |Ẇ_b| is at most twice the bound that Magnitudes takes; float arithmetic may go beyond.
  sums.headroom = CeilLog2(2.5 * static_cast<double>(sums.points));
  sums.low_bits = 61 - CeilLog2(static_cast<double>(sums.points) * (1 << D));

  auto* sums_of = reinterpret_cast<unsigned long long*>(units + count);
  const int64_t room = bytes - count * static_cast<int64_t>(sizeof(Unit));
  cudaError_t error = cudaMemsetAsync(units, 0, count * sizeof(Unit), stream);
  if (error != cudaSuccess) return error;
  const uint32_t blocks_of_table = static_cast<uint32_t>(Min(CeilDiv(sums.points, 8 * kRows), CeilDiv(1024, tables)));
  const dim3 blocks_of_magnitudes(static_cast<unsigned>(tables * blocks_of_table),
                                  static_cast<unsigned>(CeilDiv(grid.levels * CeilDiv(grid.features, 2), kWarp)));
  Magnitudes<T, !std::is_same_v<N, T>>
      <<<blocks_of_magnitudes, dim3(kWarp, kRows), 0, stream>>>(grid, find, sums, blocks_of_table, units);

  const int64_t chunks_of_unit = CeilDiv(sums.points * 2 * grid.features, kTurns * kThreads);
  for (int64_t begin = 0, end; begin < count; begin = end) {
    end = GroupEnd(grid, begin);
    int64_t rows = 0, most = 0;
    for (int64_t u = begin; u < end; ++u) {
      rows += grid.level[u % grid.levels].rows;
      most = Max(most, grid.level[u % grid.levels].rows);
    }
    const int64_t group_bytes = rows * grid.features * kLimbs<T> * 8, blocks = (end - begin) * chunks_of_unit;
    if (group_bytes > room) return cudaErrorMemoryAllocation;
    if (error = CheckGrid(blocks); error != cudaSuccess) return error;
    if (begin == 0) {
      // Enough for all groups: each leaves zeros behind, but not all are as large as the first.
      if (error = cudaMemsetAsync(sums_of, 0, room, stream); error != cudaSuccess) return error;
    }
    AddToTable<T, N, D><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
        grid, find, sums, static_cast<uint32_t>(chunks_of_unit), begin, end, false, units, sums_of);
    const dim3 grid_of_rounding(static_cast<unsigned>(CeilDiv(most * grid.features, 4 * kThreads)),
                                static_cast<unsigned>(end - begin));
    Round<T><<<grid_of_rounding, kThreads, 0, stream>>>(grid, sums, begin, end < count, units,
                                                        reinterpret_cast<long long*>(sums_of));
  }
  AddToTable<T, N, D><<<static_cast<unsigned>(Min(count * chunks_of_unit, 256)), kThreads, 0, stream>>>(
      grid, find, sums, static_cast<uint32_t>(chunks_of_unit), 0, count, true, units, nullptr);
  return cudaGetLastError();
}

template <class T, class N, int D>
cudaError_t Launch(const HashGrid<T, T>& grid, T* parts, void* scratch, int64_t bytes, cudaStream_t stream) {
  const int64_t points = Count(grid.batch) * grid.N, blocks = CeilDiv(2 * points, kThreads), size = points * D;
  const int64_t groups = CeilDiv(grid.levels, LevelsOfThread(grid.features));
  if (cudaError_t error = CheckGrid(blocks * groups); error != cudaSuccess) return error;
  if (points > 0 && (grid.y != nullptr || grid.x_bar != nullptr)) {
    if (groups == 1) parts = grid.x_bar;
    const auto run = [&](auto kernel) {
      kernel<<<static_cast<unsigned>(blocks * groups), kThreads, 0, stream>>>(grid, static_cast<uint32_t>(blocks),
                                                                              parts);
    };
    grid.x_bar == nullptr ? run(&Points<T, N, D, false>) : run(&Points<T, N, D, true>);
    if (grid.x_bar != nullptr && groups > 1) {
      SumGroups<<<static_cast<unsigned>(CeilDiv(size, kThreads)), kThreads, 0, stream>>>(size, static_cast<int>(groups),
                                                                                         parts, grid.x_bar);
    }
  }
  if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (grid.table_bar == nullptr) return cudaSuccess;
  return AddAll<T, N, D>(grid, static_cast<Unit*>(scratch), bytes, stream);
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

template <class T>
cudaError_t LaunchHashGrid(const HashGrid<T, T>& args, T* parts, void* scratch, int64_t bytes, cudaStream_t stream) {
  using namespace KNN_ISA;
  const auto launch = [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    return HasTangents(args) ? Launch<T, Dual<T>, D>(args, parts, scratch, bytes, stream)
                             : Launch<T, T, D>(args, parts, scratch, bytes, stream);
  };
  return args.dim == 2   ? launch(std::integral_constant<int, 2>())
         : args.dim == 3 ? launch(std::integral_constant<int, 3>())
                         : launch(std::integral_constant<int, 4>());
}
template cudaError_t LaunchHashGrid(const HashGrid<float, float>&, float*, void*, int64_t, cudaStream_t);
template cudaError_t LaunchHashGrid(const HashGrid<double, double>&, double*, void*, int64_t, cudaStream_t);

}  // namespace knn
