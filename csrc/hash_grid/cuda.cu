// The hash grid on CUDA.
//
// Features and gradients in x: a thread has a point at a few neighbouring levels, all corners of a level in flight at a
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

template <class N, class T>
__device__ __forceinline__ N Joined(T value, T tangent) {
  if constexpr (std::is_same_v<N, T>) {
    return value;
  } else {
    return {value, tangent};
  }
}

// A point, and its tangent.
template <class T, class N, int D>
struct Point {
  T x[D], v[D];
  bool reaches = true;

  __device__ __forceinline__ Point(const HashGrid<T, T>& grid, int64_t b, int64_t i) {
    const T* x_in = At(grid.x.value, grid.batch, b) + i * D;
    const T* v_in = std::is_same_v<N, T> ? nullptr : AtOrNull(grid.x.tangent, grid.batch, b);
#pragma unroll
    for (int d = 0; d < D; ++d) {
      x[d] = x_in[d];
      v[d] = v_in == nullptr ? T(0) : v_in[i * D + d];
      reaches &= Reaches(x[d], grid.most_scale);
    }
  }

  // Where it lies at a level.
  __device__ __forceinline__ void Find(const HashGrid<T, T>& grid, const Level& level, uint32_t (&cell)[D],
                                       Sides<N> (&sides)[D]) const {
    const T scale = static_cast<T>(level.scale);
#pragma unroll
    for (int d = 0; d < D; ++d) {
      const Place<T> place = PlaceOf(x[d], scale);
      cell[d] = place.cell;
      sides[d] = SidesOf(grid.interpolation, Joined<N>(place.fraction, scale * v[d]), scale);
    }
  }
};

// W_b; of the nearest corner alone, 1.
template <class T, class N, int D>
__device__ __forceinline__ void Weigh(bool nearest, const Sides<N> (&sides)[D], N (&weight)[1 << D]) {
  CornerWeights<D>(sides, weight);
  if (nearest) {
#pragma unroll
    for (int b = 0; b < 1 << D; ++b) weight[b] = Constant<N>(T(b == 0 ? 1 : 0));
  }
}

// The features of all corners, in pairs; zero but for the first where only that is wanted.
template <class T, class N, int D>
__device__ __forceinline__ void LoadCorners(const HashGrid<T, T>& grid, const T* table, const T* moves, int64_t first,
                                            const uint32_t (&row)[1 << D], int k, N (&a)[1 << D], N (&b)[1 << D]) {
  constexpr int kCorners = 1 << D;
  constexpr bool kDual = !std::is_same_v<N, T>;
  const int F = grid.features;
  const bool single = F == 1, nearest = grid.interpolation == Interpolation::nearest;
  RawPair<T> raw[kCorners] = {}, raw_moves[kDual ? kCorners : 1] = {};
#pragma unroll
  for (int c = 0; c < kCorners; ++c) {
    if (c == 0 || !nearest) raw[c] = Load(table, (first + row[c]) * F + k, grid.stored, single);
  }
  if (kDual && moves != nullptr) {
#pragma unroll
    for (int c = 0; c < kCorners; ++c) {
      if (c == 0 || !nearest) raw_moves[kDual ? c : 0] = Load(moves, (first + row[c]) * F + k, grid.stored, single);
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

// What a thread of the first two kernels does: a point of all batch entries, at levels from `level` on.
struct Work {
  int64_t b, i;  // b < 0: none
  int group;
};
template <class T>
__device__ __forceinline__ Work WorkOf(const HashGrid<T, T>& grid, uint32_t blocks_of_group) {
  const uint32_t group = blockIdx.x / blocks_of_group;
  const uint32_t t = (blockIdx.x - group * blocks_of_group) * kThreads + threadIdx.x, N = static_cast<uint32_t>(grid.N);
  const uint32_t b = t / N;
  return {b < Count(grid.batch) ? static_cast<int64_t>(b) : -1, t - b * N, static_cast<int>(group)};
}

template <class T, class N, int D>
__global__ void __launch_bounds__(kThreads)
    Features(const __grid_constant__ HashGrid<T, T> grid, uint32_t blocks_of_group) {
  const Work work = WorkOf(grid, blocks_of_group);
  if (work.b < 0) return;
  const int F = grid.features, outputs = grid.levels * F;
  const int64_t at = (work.b * grid.N + work.i) * outputs;
  const Point<T, N, D> point(grid, work.b, work.i);
  const T* weights = At(grid.weights, grid.batch, work.b);
  const T* table = FeaturesAt(grid.table.value, grid.batch, work.b, grid.stored);
  const T* moves = FeaturesAt(grid.table.tangent, grid.batch, work.b, grid.stored);
  const int begin = work.group * kLevelsOfThread, end = min(begin + kLevelsOfThread, grid.levels);
  for (int l = begin; l < end; ++l) {
    const Level& level = grid.level[l];
    if (!point.reaches) {
      for (int k = 0; k < F; ++k) Store(NaN<T>(), grid.y, at + l * F + k, grid.stored);
      continue;
    }
    uint32_t cell[D], row[1 << D];
    Sides<N> sides[D];
    N weight[1 << D];
    point.Find(grid, level, cell, sides);
    FindRows<D>(level, cell, row);
    Weigh<T>(grid.interpolation == Interpolation::nearest, sides, weight);
    const T m = weights[l];
    for (int k = 0; k < F; k += 2) {
      N a[1 << D], b[1 << D], sum_a = {}, sum_b = {};
      LoadCorners<T, N, D>(grid, table, moves, level.first, row, k, a, b);
#pragma unroll
      for (int c = 0; c < 1 << D; ++c) {
        sum_a = sum_a + weight[c] * a[c];
        sum_b = sum_b + weight[c] * b[c];
      }
      Store({m * Result(sum_a), m * Result(sum_b)}, grid.y, at + l * F + k, grid.stored, F == 1);
    }
  }
}

// What a group of levels adds to the gradient in x, in `parts` [groups, batch·N, D].
template <class T, class N, int D>
__global__ void __launch_bounds__(kThreads)
    PositionBars(const __grid_constant__ HashGrid<T, T> grid, uint32_t blocks_of_group, T* parts) {
  const Work work = WorkOf(grid, blocks_of_group);
  if (work.b < 0) return;
  const int F = grid.features, outputs = grid.levels * F;
  const Point<T, N, D> point(grid, work.b, work.i);
  const T* weights = At(grid.weights, grid.batch, work.b);
  const T* table = FeaturesAt(grid.table.value, grid.batch, work.b, grid.stored);
  const T* moves = FeaturesAt(grid.table.tangent, grid.batch, work.b, grid.stored);
  const T* ct = FeaturesAt(grid.ct.value, grid.batch, work.b, grid.stored);
  const T* ct_moves = FeaturesAt(grid.ct.tangent, grid.batch, work.b, grid.stored);
  const int begin = work.group * kLevelsOfThread, end = min(begin + kLevelsOfThread, grid.levels);
  N bar[D] = {};
  if (point.reaches && grid.interpolation != Interpolation::nearest) {
    for (int l = begin; l < end; ++l) {
      const Level& level = grid.level[l];
      uint32_t cell[D], row[1 << D];
      Sides<N> sides[D];
      point.Find(grid, level, cell, sides);
      FindRows<D>(level, cell, row);
      const T m = weights[l];
      N u[1 << D] = {};
      for (int k = 0; k < F; k += 2) {
        const int64_t at = work.i * outputs + l * F + k;
        const Pair<T> c = Converted<T>(Load(ct, at, grid.stored, F == 1), grid.stored);
        Pair<T> dc = {};
        if (ct_moves != nullptr) dc = Converted<T>(Load(ct_moves, at, grid.stored, F == 1), grid.stored);
        const N c_a = m * Joined<N>(c.a, dc.a), c_b = m * Joined<N>(c.b, dc.b);
        N a[1 << D], b[1 << D];
        LoadCorners<T, N, D>(grid, table, moves, level.first, row, k, a, b);
#pragma unroll
        for (int i = 0; i < 1 << D; ++i) {
          u[i] = u[i] + c_a * a[i];
          if (F > 1) u[i] = u[i] + c_b * b[i];
        }
      }
      AddPositionBar<D>(sides, u, bar);
    }
  }
  T* out = parts + ((work.group * Count(grid.batch) + work.b) * grid.N + work.i) * D;
#pragma unroll
  for (int d = 0; d < D; ++d) out[d] = point.reaches ? Result(bar[d]) : NaN<T>();
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
    const uint32_t s = p / N;
    *b = Join(split, c, s);
    *i = p - s * N;
  }
};

constexpr int kRows = 8;  // of a block of Magnitudes, which is (kWarp, kRows)

template <class T, bool kDual>
__global__ void Magnitudes(const __grid_constant__ HashGrid<T, T> grid, const __grid_constant__ Finder<T> find,
                           Sums sums, uint32_t blocks_of_table, Unit* units) {
  const uint32_t c = blockIdx.x / blocks_of_table, first = blockIdx.x - c * blocks_of_table;
  const int F = grid.features, outputs = grid.levels * F;
  __shared__ double most_of[kRows][kWarp];
  for (int j0 = 0; j0 < outputs; j0 += kWarp) {
    const int j = j0 + threadIdx.x, l = j / F;
    double most = 0;
    for (uint32_t p = first * kRows + threadIdx.y; j < outputs && p < sums.points; p += blocks_of_table * kRows) {
      int64_t b, i;
      find(c, p, &b, &i);
      const T m = At(grid.weights, grid.batch, b)[l];
      const T* ct = FeaturesAt(grid.ct.value, grid.batch, b, grid.stored);
      double bound = fabs(double{m * Converted<T>(Load(ct, i * outputs + j, grid.stored, true), grid.stored).a});
      if constexpr (kDual) {
        // |Ẇ_b| ≤ Σ_d |a s'(f_d) ẋ_d|, |s'| ≤ 3/2
        double speed = 0;
        if (const T* v = AtOrNull(grid.x.tangent, grid.batch, b); v != nullptr) {
          for (int d = 0; d < grid.dim; ++d)
            speed += 1.5 * fabs(double{grid.level[l].scale} * double{v[i * grid.dim + d]});
        }
        bound *= speed;
        if (const T* v = FeaturesAt(grid.ct.tangent, grid.batch, b, grid.stored); v != nullptr) {
          bound += fabs(double{m * Converted<T>(Load(v, i * outputs + j, grid.stored, true), grid.stored).a});
        }
      }
      if (bound <= Precision<double>::kMost) most = fmax(most, bound);
    }
    most_of[threadIdx.y][threadIdx.x] = most;
    __syncthreads();
    if (threadIdx.y == 0 && j < outputs) {
      for (int r = 1; r < kRows; ++r) most = fmax(most, most_of[r][threadIdx.x]);
      if (most > 0) atomicMax(&units[int64_t{c} * grid.levels + l].most, __double_as_longlong(most));
    }
    __syncthreads();
  }
}

// A thread has one feature of a point at a level, so that neighbouring lanes add to neighbouring numbers. `sums_of`
// begins with the rows of unit `first_unit`. If `mark`, NaN is written instead where what would be added is not finite.
template <class T, class N, int D>
__global__ void __launch_bounds__(kThreads)
    AddToTable(const __grid_constant__ HashGrid<T, T> grid, const __grid_constant__ Finder<T> find, Sums sums,
               uint32_t chunks_of_unit, int64_t first_unit, int64_t end_unit, bool mark, Unit* units,
               unsigned long long* sums_of) {
  const int F = grid.features, outputs = grid.levels * F;
  const bool nearest = grid.interpolation == Interpolation::nearest;
  const int64_t first_row = first_unit / grid.levels * grid.rows + grid.level[first_unit % grid.levels].first;
  const int64_t chunks = (end_unit - first_unit) * chunks_of_unit;
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const uint32_t of_group = static_cast<uint32_t>(chunk / chunks_of_unit);
    const int64_t unit = first_unit + of_group;
    if (mark && units[unit].broken == 0) continue;
    const uint32_t c = static_cast<uint32_t>(unit) / grid.levels, l = static_cast<uint32_t>(unit) - c * grid.levels;
    const uint32_t t = static_cast<uint32_t>(chunk - int64_t{of_group} * chunks_of_unit) * kThreads + threadIdx.x;
    const uint32_t p = t / F, k = t - p * F;
    const bool exists = p < sums.points;
    int64_t b, i;
    find(c, exists ? p : 0, &b, &i);
    const Level& level = grid.level[l];
    const Point<T, N, D> point(grid, b, i);
    const bool adds = exists && point.reaches;
    uint32_t cell[D], row[1 << D];
    Sides<N> sides[D];
    N weight[1 << D];
    point.Find(grid, level, cell, sides);
    FindRows<D>(level, cell, row);
    Weigh<T>(nearest, sides, weight);
    const int64_t at = i * outputs + l * F + k;
    const T m = At(grid.weights, grid.batch, b)[l];
    const T* ct = FeaturesAt(grid.ct.value, grid.batch, b, grid.stored);
    const T* ct_moves = std::is_same_v<N, T> ? nullptr : FeaturesAt(grid.ct.tangent, grid.batch, b, grid.stored);
    const T value = Converted<T>(Load(ct, at, grid.stored, true), grid.stored).a;
    const T tangent = ct_moves == nullptr ? T(0) : Converted<T>(Load(ct_moves, at, grid.stored, true), grid.stored).a;
    const N bar = m * Joined<N>(value, tangent);
    if (mark) {
#pragma unroll
      for (int s = 0; s < 1 << D; ++s) {
        const int64_t entry = (int64_t{c} * grid.rows + level.first + row[s]) * F + k;
        const bool finite = fabs(Result(weight[s] * bar)) <= Precision<T>::kMost;
        if (adds && !finite && (s == 0 || !nearest)) Store(NaN<T>(), grid.table_bar, entry, grid.stored);
      }
      continue;
    }
    // Where all lanes are in one cell, they are summed first: they would wait for each other.
    bool same = adds;
#pragma unroll
    for (int d = 0; d < D; ++d) same &= cell[d] == __shfl_sync(kFullMask, cell[d], 0);
    const bool together = __all_sync(kFullMask, same);
    const int exponent = Exponent(units[unit].most, sums.headroom);
    const double power = Power(exponent);
    const int64_t base = int64_t{c} * grid.rows + level.first - first_row;
    bool broken = false;
#pragma unroll
    for (int s = 0; s < 1 << D; ++s) {
      if (s > 0 && nearest) continue;
      const T part = Result(weight[s] * bar);
      const bool finite = fabs(part) <= Precision<T>::kMost;
      broken |= adds && !finite;
      const double scaled = adds && finite ? static_cast<double>(part) * power : 0.0;
      long long limb[kLimbs<T>];
      limb[0] = __double2ll_rn(scaled);
      if constexpr (kLimbs<T> == 2) {
        limb[1] = __double2ll_rn((scaled - static_cast<double>(limb[0])) * Power(sums.low_bits));
      }
#pragma unroll
      for (int n = 0; n < kLimbs<T>; ++n) {
        if (together) {
          for (int step = F; step < kWarp; step *= 2) limb[n] += __shfl_xor_sync(kFullMask, limb[n], step);
        }
        if (limb[n] == 0 || (together && (threadIdx.x & (kWarp - 1)) >= F)) continue;
        atomicAdd(sums_of + ((base + row[s]) * F + k) * kLimbs<T> + n, static_cast<unsigned long long>(limb[n]));
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
  const uint32_t blocks_of_table = static_cast<uint32_t>(Min(CeilDiv(sums.points, 4 * kRows), CeilDiv(1024, tables)));
  Magnitudes<T, !std::is_same_v<N, T>>
      <<<static_cast<unsigned>(tables * blocks_of_table), dim3(kWarp, kRows), 0, stream>>>(grid, find, sums,
                                                                                           blocks_of_table, units);

  const int64_t chunks_of_unit = CeilDiv(sums.points * grid.features, kThreads);
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
  const int64_t points = Count(grid.batch) * grid.N, blocks = CeilDiv(points, kThreads);
  const int64_t groups = CeilDiv(grid.levels, kLevelsOfThread), size = points * D;
  if (cudaError_t error = CheckGrid(blocks * groups); error != cudaSuccess) return error;
  if (points > 0 && grid.y != nullptr) {
    Features<T, N, D>
        <<<static_cast<unsigned>(blocks * groups), kThreads, 0, stream>>>(grid, static_cast<uint32_t>(blocks));
  }
  if (points > 0 && grid.x_bar != nullptr) {
    if (groups == 1) parts = grid.x_bar;
    PositionBars<T, N, D>
        <<<static_cast<unsigned>(blocks * groups), kThreads, 0, stream>>>(grid, static_cast<uint32_t>(blocks), parts);
    if (groups > 1) {
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
