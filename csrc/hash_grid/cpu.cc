// The hash grid on CPUs.
//
// Features and gradients in x are found for some points at a time, level after level: first all rows of the table that
// the points touch are asked for, so that they are on their way while the arithmetic goes on. Gradients in the table
// are found for a level at a time, whose rows no other task writes, all points in their order: the same bits whatever
// threads do. They are summed in double.

#include "hash_grid/cpu.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <new>
#include <thread>
#include <type_traits>

#include "hash_grid/formulas.h"

namespace knn::KNN_ISA {
namespace {

// N is T or Dual<T>.
template <class T, class S, class N, int D>
struct Grid {
  using Args = HashGrid<T, S>;
  static constexpr int kCorners = 1 << D, kChunk = 32;
  static constexpr int64_t kPointsOfTask = 512;
  static constexpr bool kDual = !std::is_same_v<N, T>;
  static constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();  // what belongs to a point that is not finite

  // Up to kChunk points, at one level.
  struct Chunk {
    int n, corners;
    bool reaches[kChunk];
    T x[D][kChunk], fraction[D][kChunk];
    uint32_t cell[D][kChunk], row[kChunk][kCorners];

    Chunk(const Args& args, const Row<T, T>& x_in, int64_t first, int64_t end)
        : n(static_cast<int>(Min(kChunk, end - first))),
          corners(args.interpolation == Interpolation::nearest ? 1 : kCorners) {
      for (int i = 0; i < n; ++i) {
        reaches[i] = true;
        for (int d = 0; d < D; ++d) reaches[i] &= Reaches(x_in[(first + i) * D + d], args.most_scale);
        for (int d = 0; d < D; ++d) x[d][i] = reaches[i] ? x_in[(first + i) * D + d] : 0;
      }
    }

    void Find(const Level& level) {
      for (int d = 0; d < D; ++d) {
        for (int i = 0; i < n; ++i) {
          const Place<T> place = PlaceOf(x[d][i], static_cast<T>(level.scale));
          cell[d][i] = place.cell, fraction[d][i] = place.fraction;
        }
      }
      for (int i = 0; i < n; ++i) {
        uint32_t at[D];
        for (int d = 0; d < D; ++d) at[d] = cell[d][i];
        FindRows<D>(level, at, row[i]);
      }
    }

    // Has all rows brought to the cache at once, to be read (0) or written (1): left to themselves, few are on their
    // way at a time.
    template <int write, class R>
    void Fetch(const R* rows, int features) const {
      for (int i = 0; i < n; ++i) {
        for (int b = 0; b < corners; ++b) __builtin_prefetch(rows + int64_t{row[i][b]} * features, write);
      }
    }
  };

  // What a point's corners weigh, and its sides unless there is just one corner.
  static KNN_FN void Weigh(const Args& args, const Level& level, const Chunk& chunk, int i, const Row<N, T>& x,
                           int64_t point, Sides<N> (&sides)[D], N (&weight)[kCorners]) {
    if (chunk.corners == 1) {
      weight[0] = Constant<N>(T(1));
      return;
    }
    const T scale = static_cast<T>(level.scale);
    for (int d = 0; d < D; ++d) {
      N f = Constant<N>(chunk.fraction[d][i]);
      if constexpr (kDual) f.tangent = scale * x[point * D + d].tangent;
      sides[d] = SidesOf(args.interpolation, f, scale);
    }
    CornerWeights<D>(sides, weight);
  }

  static int64_t TasksOfEntry(const Args& args) { return CeilDiv(args.N, kPointsOfTask); }
  static int64_t PointTasks(const Args& args) {
    return args.y == nullptr && args.x_bar == nullptr ? 0 : Count(args.batch) * TasksOfEntry(args);
  }

  static void Points(const Args& args, void* /*scratch*/, int64_t task) {
    const int64_t b = task / TasksOfEntry(args), begin = task % TasksOfEntry(args) * kPointsOfTask;
    const int64_t end = Min(begin + kPointsOfTask, args.N);
    const Row<T, T> x(args.x, args.batch, b);
    for (int64_t first = begin; first < end; first += kChunk) {
      Chunk chunk(args, x, first, end);
      N x_bar[kChunk][D] = {};
      for (int l = 0; l < args.levels; ++l) AtLevel(args, b, l, first, chunk, x_bar);
      if (args.x_bar == nullptr) continue;
      for (int i = 0; i < chunk.n; ++i) {
        for (int d = 0; d < D; ++d) {
          args.x_bar[(b * args.N + first + i) * D + d] = chunk.reaches[i] ? Result(x_bar[i][d]) : kNaN;
        }
      }
    }
  }

  static void AtLevel(const Args& args, int64_t entry, int l, int64_t first, Chunk& chunk, N (&x_bar)[kChunk][D]) {
    const Level& level = args.level[l];
    const int F = args.features, outputs = args.levels * F;
    const T m = At(args.weights, args.batch, entry)[l];
    const Row<N, T> x(args.x, args.batch, entry);
    const Row<N, S> table(args.table, args.batch, entry, args.stored), ct(args.ct, args.batch, entry, args.stored);
    chunk.Find(level);
    for (const auto& operand : {args.table.value, args.table.tangent}) {
      const S* rows = AtOrNull(operand, args.batch, entry);
      if (rows != nullptr) chunk.template Fetch<0>(rows + int64_t{level.first} * F, F);
    }
    for (int i = 0; i < chunk.n; ++i) {
      const int64_t point = first + i, at = point * outputs + l * F;
      if (!chunk.reaches[i]) {
        if (args.y != nullptr) {
          for (int k = 0; k < F; ++k) Narrow(kNaN, args.stored, args.y + entry * args.N * outputs + at + k);
        }
        continue;
      }
      Sides<N> sides[D];
      N weight[kCorners];
      Weigh(args, level, chunk, i, x, point, sides, weight);
      int64_t row[kCorners];
      for (int b = 0; b < chunk.corners; ++b) row[b] = (int64_t{level.first} + chunk.row[i][b]) * F;
      if (args.y != nullptr) {
        for (int k = 0; k < F; ++k) {
          N sum = {};
          for (int b = 0; b < chunk.corners; ++b) sum = sum + weight[b] * table[row[b] + k];
          Narrow(m * Result(sum), args.stored, args.y + entry * args.N * outputs + at + k);
        }
      }
      if (args.x_bar != nullptr && chunk.corners > 1) {
        N u[kCorners] = {};
        for (int k = 0; k < F; ++k) {
          const N c = m * ct[at + k];
          for (int b = 0; b < kCorners; ++b) u[b] = u[b] + c * table[row[b] + k];
        }
        N difference[D];
        Interpolate<D>(sides, u, difference);
        for (int d = 0; d < D; ++d) x_bar[i][d] = x_bar[i][d] + sides[d].slope * difference[d];
      }
    }
  }

  // A gradient in the table is summed in a slot of scratch, which a task takes for as long as it runs.
  static constexpr int kSlots = 8;
  struct Slots {
    std::atomic<bool> taken[kSlots];
  };
  static constexpr bool kSumsInPlace = std::is_same_v<S, double>;
  static int64_t SlotSize(const Args& args) {
    uint32_t most = 0;
    for (int l = 0; l < args.levels; ++l) most = std::max(most, args.level[l].rows);
    return int64_t{most} * args.features;
  }
  static int SlotCount(const Args& args) { return static_cast<int>(Min(kSlots, LevelTasks(args))); }
  static int64_t ScratchBytes(const Args& args) {
    if (args.table_bar == nullptr || kSumsInPlace) return 0;
    return 64 + SlotCount(args) * SlotSize(args) * sizeof(double);
  }
  static int64_t SlotTasks(const Args& args) { return ScratchBytes(args) > 0 ? 1 : 0; }
  static void FreeSlots(const Args&, void* scratch, int64_t) { new (scratch) Slots(); }

  static int64_t LevelTasks(const Args& args) {
    return args.table_bar == nullptr ? 0 : Count(args.table_batch) * args.levels;
  }

  static void SumLevel(const Args& args, void* scratch, int64_t task) {
    const int64_t c = task / args.levels;
    const Level& level = args.level[task % args.levels];
    const int64_t size = int64_t{level.rows} * args.features;
    S* out = args.table_bar + (c * args.rows + level.first) * args.features;
    if constexpr (kSumsInPlace) {
      std::fill_n(out, size, 0.0);
      AddPoints(args, c, static_cast<int>(task % args.levels), out);
    } else {
      Slots& slots = *static_cast<Slots*>(scratch);
      int slot = 0;
      while (slots.taken[slot].exchange(true, std::memory_order_acquire)) {
        slot = (slot + 1) % SlotCount(args);
        if (slot == 0) std::this_thread::yield();
      }
      double* sums = reinterpret_cast<double*>(static_cast<char*>(scratch) + 64) + slot * SlotSize(args);
      std::fill_n(sums, size, 0.0);
      AddPoints(args, c, static_cast<int>(task % args.levels), sums);
      for (int64_t i = 0; i < size; ++i) Narrow(static_cast<T>(sums[i]), args.stored, out + i);
      slots.taken[slot].store(false, std::memory_order_release);
    }
  }

  static void AddPoints(const Args& args, int64_t c, int l, double* sums) {
    const Level& level = args.level[l];
    const int F = args.features, outputs = args.levels * F;
    const SplitBatch split = Split(args.batch, args.table_batch);
    const int64_t entries = Count(args.batch) / Max(1, Count(args.table_batch));
    for (int64_t s = 0; s < entries; ++s) {
      const int64_t entry = Join(split, static_cast<uint32_t>(c), static_cast<uint32_t>(s));
      const T m = At(args.weights, args.batch, entry)[l];
      const Row<T, T> places(args.x, args.batch, entry);
      const Row<N, T> x(args.x, args.batch, entry);
      const Row<N, S> ct(args.ct, args.batch, entry, args.stored);
      for (int64_t first = 0; first < args.N; first += kChunk) {
        Chunk chunk(args, places, first, args.N);
        chunk.Find(level);
        chunk.template Fetch<1>(sums, F);
        for (int i = 0; i < chunk.n; ++i) {
          if (!chunk.reaches[i]) continue;
          Sides<N> sides[D];
          N weight[kCorners];
          Weigh(args, level, chunk, i, x, first + i, sides, weight);
          for (int k = 0; k < F; ++k) {
            const N bar = m * ct[(first + i) * outputs + l * F + k];
            for (int b = 0; b < chunk.corners; ++b) {
              const T part = Result(weight[b] * bar);
              // What is infinite becomes NaN, as where a corner of weight 0 meets it.
              sums[int64_t{chunk.row[i][b]} * F + k] += part + (part - part);
            }
          }
        }
      }
    }
  }

  static constexpr CpuKernel<Args> kKernel = {
      &ScratchBytes, {{&PointTasks, &Points}, {&SlotTasks, &FreeSlots}, {&LevelTasks, &SumLevel}, {nullptr, nullptr}}};
};

}  // namespace

template <class T, class S>
CpuKernel<HashGrid<T, S>> HashGridKernel(const HashGrid<T, S>& args) {
  const auto of = [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    return HasTangents(args) ? Grid<T, S, Dual<T>, D>::kKernel : Grid<T, S, T, D>::kKernel;
  };
  return args.dim == 2   ? of(std::integral_constant<int, 2>())
         : args.dim == 3 ? of(std::integral_constant<int, 3>())
                         : of(std::integral_constant<int, 4>());
}
template CpuKernel<HashGrid<float, float>> HashGridKernel(const HashGrid<float, float>&);
template CpuKernel<HashGrid<double, double>> HashGridKernel(const HashGrid<double, double>&);
template CpuKernel<HashGrid<float, Float16>> HashGridKernel(const HashGrid<float, Float16>&);

}  // namespace knn::KNN_ISA
