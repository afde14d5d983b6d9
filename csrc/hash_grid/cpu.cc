// The hash grid on CPUs: a chunk of points at a level at a time.
//
// Positions, rows, weights and what is made of them are computed in vectors of points. In between, rows of the table
// are copied to where vectors are read from, or added to, one by one. All that a chunk touches are asked for while the
// chunk before is worked on, so that they are on their way together.
//
// Features and gradients in x are found for all points at one level before the next, so that what caches have of the
// table serves many. Gradients in the table are found for a level at a time, whose rows no other task writes, all
// points in their order: the same bits whatever threads do. They are summed in double.

#include "hash_grid/cpu.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <new>
#include <thread>
#include <type_traits>

#include "common/simd.h"
#include "hash_grid/formulas.h"

// Of functions that do much in a call: GCC would copy them to each of their callers, in three times the time to
// compile.
#define KNN_CALLED __attribute__((noinline))

namespace knn::KNN_ISA {
namespace {

template <class T, class S, bool kDual, int D>
struct Grid {
  using Args = HashGrid<T, S>;
  using V = Vec<T>;
  using N = std::conditional_t<kDual, Dual<V>, V>;
  static constexpr int kCorners = 1 << D, kChunk = 32, kChunksOfBlock = 16, kMostFeatures = 8, kLine = 64;
  static constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();  // what belongs to a point that is not finite

  // Numbers of a chunk's points, so many of each, and their tangents.
  template <int count>
  struct alignas(kLine) Numbers {
    T value[count][kChunk], tangent[kDual ? count : 1][kChunk];

    // Number c of a vector of points, from point i on.
    KNN_FN N At(int c, int i) const {
      if constexpr (kDual) {
        return {V::Load(value[c] + i), V::Load(tangent[c] + i)};
      } else {
        return V::Load(value[c] + i);
      }
    }
  };

  // Up to kChunk points, and zeros behind the last one.
  struct Chunk {
    int n, corners;
    int64_t first;  // of the points of its batch entry
    bool reaches[kChunk];
    Numbers<D> x;  // 0 where a point does not reach the grid

    Chunk(const Args& args, int64_t entry, int64_t first)
        : n(static_cast<int>(Min(kChunk, args.N - first))),
          corners(args.interpolation == Interpolation::nearest ? 1 : kCorners),
          first(first),
          reaches(),
          x() {
      const T* at = At(args.x.value, args.batch, entry) + first * D;
      const T* moves = AtOrNull(args.x.tangent, args.batch, entry);
      for (int i = 0; i < n; ++i) {
        reaches[i] = true;
        for (int d = 0; d < D; ++d) reaches[i] &= Reaches(at[i * D + d], args.most_scale);
        for (int d = 0; d < D; ++d) {
          x.value[d][i] = reaches[i] ? at[i * D + d] : 0;
          if (kDual && moves != nullptr) x.tangent[d][i] = moves[(first + i) * D + d];
        }
      }
    }
  };

  // Where the points of a chunk lie at a level.
  struct Places {
    const Chunk* chunk;
    alignas(kLine) T fraction[D][kChunk];
    alignas(kLine) uint32_t cell[D][kChunk], row[kCorners][kChunk];

    KNN_CALLED void Find(const Chunk& of, const Level& from) {
      chunk = &of;
      const Level level = from;  // which writing rows does not change
      for (int d = 0; d < D; ++d) {
        for (int i = 0; i < kChunk; ++i) {
          const Place<T> place = PlaceOf(of.x.value[d][i], static_cast<T>(level.scale));
          cell[d][i] = place.cell, fraction[d][i] = place.fraction;
        }
      }
      for (int i = 0; i < kChunk; ++i) {
        uint32_t at[D], number[kCorners];
        for (int d = 0; d < D; ++d) at[d] = cell[d][i];
        FindNumbers<D>(level, at, number);
        for (int b = 0; b < kCorners; ++b) row[b][i] = number[b] & (level.hashed ? level.rows - 1 : ~0u);
      }
      if (level.hashed) return;
      for (auto& rows : row) {
        uint32_t beyond = 0;
        for (int i = 0; i < kChunk; ++i) beyond |= rows[i] >= level.rows;
        for (int i = 0; beyond != 0 && i < kChunk; ++i) rows[i] %= level.rows;
      }
    }

    // Has all rows brought to the cache at once, to be read (0) or written (1): left to themselves, few are on their
    // way at a time.
    template <int write, class R>
    void Fetch(const R* rows, int features) const {
      for (int b = 0; b < chunk->corners; ++b) {
        for (int i = 0; i < chunk->n; ++i) __builtin_prefetch(rows + int64_t{row[b][i]} * features, write);
      }
    }

    // Of a vector of points, from point i on.
    KNN_FN void Weigh(const Args& args, const Level& level, int i, Sides<N> (&sides)[D]) const {
      const V scale = V::Broadcast(static_cast<T>(level.scale));
      for (int d = 0; d < D; ++d) {
        N f;
        if constexpr (kDual) {
          f = {V::Load(fraction[d] + i), scale * V::Load(chunk->x.tangent[d] + i)};
        } else {
          f = V::Load(fraction[d] + i);
        }
        sides[d] = SidesOf(args.interpolation, f, scale);
      }
    }
  };

  // What a task keeps of a chunk at a level; of features at corners, feature k at corner b is number k·kCorners + b.
  struct Work {
    Numbers<kMostFeatures * kCorners> features;
    Numbers<kMostFeatures> ct;  // times m
    alignas(kLine) T y[kMostFeatures][kChunk], x_bar[D][kChunk];
    alignas(kLine) T parts[kMostFeatures * kCorners][kChunk];  // of the table's gradient

    // To zeros, as what is not given or not there counts.
    void Clear(const Args& args) {
      ct = {};
      for (auto& bar : x_bar) std::fill_n(bar, kChunk, T(0));
      if (kDual) std::fill_n(features.tangent[0], args.features * kCorners * kChunk, T(0));
    }
  };

  // Calls run(F) with the number of features as a constant.
  template <class Run>
  static KNN_FN void WithFeatures(const Args& args, Run&& run) {
    switch (args.features) {
      case 1:
        return run(std::integral_constant<int, 1>());
      case 2:
        return run(std::integral_constant<int, 2>());
      case 4:
        return run(std::integral_constant<int, 4>());
      default:
        return run(std::integral_constant<int, kMostFeatures>());
    }
  }

  KNN_CALLED static void ReadCorners(const Args& args, const Places& places, const S* rows, T (*to)[kChunk]) {
    const Stored stored = args.stored;
    WithFeatures(args, [&](auto features) {
      constexpr int F = features;
      for (int b = 0; b < places.chunk->corners; ++b) {
        for (int i = 0; i < kChunk; ++i) {
          const S* row = rows + int64_t{places.row[b][i]} * F;
          for (int k = 0; k < F; ++k) to[k * kCorners + b][i] = Widen(row[k], stored);
        }
      }
    });
  }

  KNN_CALLED static void ReadCotangents(const Args& args, int64_t entry, int l, const Chunk& chunk,
                                        Numbers<kMostFeatures>* to) {
    const Stored stored = args.stored;
    const int64_t outputs = int64_t{args.levels} * args.features;
    const T m = At(args.weights, args.batch, entry)[l];
    const auto read = [&](const Operand<const S>& operand, T(*to)[kChunk]) {
      const S* from = AtOrNull(operand, args.batch, entry);
      if (from == nullptr) return;
      from += chunk.first * outputs + l * args.features;
      WithFeatures(args, [&](auto features) {
        for (int i = 0; i < chunk.n; ++i) {
          for (int k = 0; k < features; ++k) to[k][i] = m * Widen(from[i * outputs + k], stored);
        }
      });
    };
    read(args.ct.value, to->value);
    if (kDual) read(args.ct.tangent, to->tangent);
  }

  static int64_t ChunksOfEntry(const Args& args) { return CeilDiv(args.N, kChunk); }
  static int64_t Chunks(const Args& args) { return Count(args.batch) * ChunksOfEntry(args); }

  // Calls run(places) for `count` chunks, when the rows of the one behind have been asked for by fetch(places).
  template <class Fetch, class Run>
  static KNN_FN void AtPlaces(const Chunk* chunks, int64_t count, const Level& level, Fetch&& fetch, Run&& run) {
    Places places[2];
    for (int64_t c = 0; c <= count; ++c) {
      if (c < count) {
        places[c & 1].Find(chunks[c], level);
        fetch(places[c & 1]);
      }
      if (c > 0) run(places[~c & 1]);
    }
  }

  // A block is some chunks of a batch entry.
  static int64_t BlocksOfEntry(const Args& args) { return CeilDiv(ChunksOfEntry(args), kChunksOfBlock); }
  static int64_t Blocks(const Args& args) { return Count(args.batch) * BlocksOfEntry(args); }

  // Scratch holds slots, turns of blocks, all chunks, and the sums of slots.
  //
  // In a slot a gradient in the table is summed. A task takes one for as long as it runs.
  static constexpr int kSlots = 8;
  struct alignas(kLine) Slots {
    std::atomic<bool> taken[kSlots];
    int64_t zeros[kSlots];  // how many of a slot's sums are 0, from the first on
  };
  using Turn = std::atomic<int32_t>;  // the level whose turn it is to add to the block's gradient in x
  static constexpr bool kSumsInPlace = std::is_same_v<S, double>;

  static int64_t SlotSize(const Args& args) {
    uint32_t most = 0;
    for (int l = 0; l < args.levels; ++l) most = std::max(most, args.level[l].rows);
    return int64_t{most} * args.features;
  }
  static int SlotCount(const Args& args) { return kSumsInPlace ? 0 : static_cast<int>(Min(kSlots, LevelTasks(args))); }
  static int64_t ChunksAt(const Args& args) {
    return sizeof(Slots) + CeilDiv(Blocks(args) * sizeof(Turn), kLine) * kLine;
  }
  static int64_t SumsAt(const Args& args) { return ChunksAt(args) + Chunks(args) * sizeof(Chunk); }
  static int64_t ScratchBytes(const Args& args) {
    return SumsAt(args) + SlotCount(args) * SlotSize(args) * sizeof(double);
  }
  template <class A>
  static A* InScratch(void* scratch, int64_t at) {
    return reinterpret_cast<A*>(static_cast<char*>(scratch) + at);
  }
  static Turn& TurnOf(void* scratch, int64_t block) { return InScratch<Turn>(scratch, sizeof(Slots))[block]; }
  static Chunk* ChunksOf(const Args& args, void* scratch, int64_t entry) {
    return InScratch<Chunk>(scratch, ChunksAt(args)) + entry * ChunksOfEntry(args);
  }

  static int64_t BeginTasks(const Args& args) { return 1 + Blocks(args); }
  static void Begin(const Args& args, void* scratch, int64_t task) {
    if (task == 0) {
      new (scratch) Slots();
      return;
    }
    const int64_t block = task - 1, entry = block / BlocksOfEntry(args);
    new (&TurnOf(scratch, block)) Turn(0);
    const int64_t begin = block % BlocksOfEntry(args) * kChunksOfBlock;
    for (int64_t c = begin; c < Min(begin + kChunksOfBlock, ChunksOfEntry(args)); ++c) {
      new (ChunksOf(args, scratch, entry) + c) Chunk(args, entry, c * kChunk);
    }
  }

  static int64_t PointTasks(const Args& args) {
    return args.y == nullptr && args.x_bar == nullptr ? 0 : Blocks(args) * args.levels;
  }

  static void Points(const Args& args, void* scratch, int64_t task) {
    const int l = static_cast<int>(task / Blocks(args));
    const int64_t block = task % Blocks(args), entry = block / BlocksOfEntry(args);
    const int64_t begin = block % BlocksOfEntry(args) * kChunksOfBlock;
    Turn& turn = TurnOf(scratch, block);
    // Levels add to the gradient in x in their order. Tasks before this one are done, or run on other threads.
    while (turn.load(std::memory_order_acquire) != l) std::this_thread::yield();
    const int64_t offset = int64_t{args.level[l].first} * args.features;
    const S* table = At(args.table.value, args.batch, entry) + offset;
    const S* moves = AtOrNull(args.table.tangent, args.batch, entry);
    if (moves != nullptr) moves += offset;
    Work work;
    work.Clear(args);
    AtPlaces(
        ChunksOf(args, scratch, entry) + begin, Min(kChunksOfBlock, ChunksOfEntry(args) - begin), args.level[l],
        [&](const Places& places) {
          places.template Fetch<0>(table, args.features);
          if (moves != nullptr) places.template Fetch<0>(moves, args.features);
        },
        [&](const Places& places) {
          ReadCorners(args, places, table, work.features.value);
          if (kDual && moves != nullptr) ReadCorners(args, places, moves, work.features.tangent);
          AtLevel(args, entry, l, places, work);
        });
    turn.store(l + 1, std::memory_order_release);
  }

  static void AtLevel(const Args& args, int64_t entry, int l, const Places& places, Work& work) {
    const Level& level = args.level[l];
    const Chunk& chunk = *places.chunk;
    const int F = args.features;
    const bool nearest = chunk.corners == 1, wants_x = args.x_bar != nullptr && !nearest;
    const V m = V::Broadcast(At(args.weights, args.batch, entry)[l]);
    if (wants_x) ReadCotangents(args, entry, l, chunk, &work.ct);
    for (int i = 0; i < kChunk; i += V::kLanes) {
      Sides<N> sides[D];
      if (!nearest) places.Weigh(args, level, i, sides);
      if (args.y != nullptr && nearest) {
        for (int k = 0; k < F; ++k) (m * Result(work.features.At(k * kCorners, i))).Store(work.y[k] + i);
      } else if (args.y != nullptr) {
        N weight[kCorners];
        CornerWeights<D>(sides, weight);
        for (int k = 0; k < F; ++k) {
          N sum = {};
          for (int b = 0; b < kCorners; ++b) sum = sum + weight[b] * work.features.At(k * kCorners + b, i);
          (m * Result(sum)).Store(work.y[k] + i);
        }
      }
      if (wants_x) {
        N u[kCorners] = {}, difference[D];
        for (int k = 0; k < F; ++k) {
          const N c = work.ct.At(k, i);
          for (int b = 0; b < kCorners; ++b) u[b] = u[b] + c * work.features.At(k * kCorners + b, i);
        }
        Interpolate<D>(sides, u, difference);
        for (int d = 0; d < D; ++d) Result(sides[d].slope * difference[d]).Store(work.x_bar[d] + i);
      }
    }
    const int64_t first = entry * args.N + chunk.first;
    if (args.x_bar != nullptr) {
      T* x_bar = args.x_bar + first * D;
      for (int i = 0; i < chunk.n; ++i) {
        for (int d = 0; d < D; ++d) {
          const T before = l == 0 ? T(0) : x_bar[i * D + d];
          x_bar[i * D + d] = chunk.reaches[i] ? before + work.x_bar[d][i] : kNaN;
        }
      }
    }
    if (args.y != nullptr) {
      const int64_t outputs = int64_t{args.levels} * F;
      S* y = args.y + first * outputs + l * F;
      WithFeatures(args, [&](auto features) {
        for (int i = 0; i < chunk.n; ++i) {
          for (int k = 0; k < features; ++k) {
            Narrow(chunk.reaches[i] ? work.y[k][i] : kNaN, args.stored, y + i * outputs + k);
          }
        }
      });
    }
  }

  static int64_t LevelTasks(const Args& args) {
    return args.table_bar == nullptr ? 0 : Count(args.table_batch) * args.levels;
  }

  static void SumLevel(const Args& args, void* scratch, int64_t task) {
    const int64_t c = task / args.levels;
    const int l = static_cast<int>(task % args.levels);
    const int64_t size = int64_t{args.level[l].rows} * args.features;
    S* out = args.table_bar + (c * args.rows + args.level[l].first) * args.features;
    if constexpr (kSumsInPlace) {
      std::fill_n(out, size, 0.0);
      AddPoints(args, scratch, c, l, out);
    } else {
      Slots& slots = *static_cast<Slots*>(scratch);
      int slot = 0;
      while (slots.taken[slot].exchange(true, std::memory_order_acquire)) {
        slot = (slot + 1) % SlotCount(args);
        if (slot == 0) std::this_thread::yield();
      }
      double* sums = InScratch<double>(scratch, SumsAt(args)) + slot * SlotSize(args);
      if (int64_t& zeros = slots.zeros[slot]; zeros < size) {
        std::fill_n(sums + zeros, size - zeros, 0.0);
        zeros = size;
      }
      AddPoints(args, scratch, c, l, sums);
      for (int64_t i = 0; i < size; ++i) {
        Narrow(static_cast<T>(sums[i]), args.stored, out + i);
        sums[i] = 0;
      }
      slots.taken[slot].store(false, std::memory_order_release);
    }
  }

  static void AddPoints(const Args& args, void* scratch, int64_t c, int l, double* sums) {
    const Level& level = args.level[l];
    const SplitBatch split = Split(args.batch, args.table_batch);
    const int64_t entries = Count(args.batch) / Max(1, Count(args.table_batch));
    Work work;
    work.Clear(args);
    for (int64_t s = 0; s < entries; ++s) {
      const int64_t entry = Join(split, static_cast<uint32_t>(c), static_cast<uint32_t>(s));
      AtPlaces(
          ChunksOf(args, scratch, entry), ChunksOfEntry(args), level,
          [&](const Places& places) { places.template Fetch<1>(sums, args.features); },
          [&](const Places& places) {
            ReadCotangents(args, entry, l, *places.chunk, &work.ct);
            FindParts(args, level, places, work);
            AddParts(args, places, work, sums);
          });
    }
  }

  static void FindParts(const Args& args, const Level& level, const Places& places, Work& work) {
    const int corners = places.chunk->corners;
    for (int i = 0; i < kChunk; i += V::kLanes) {
      Sides<N> sides[D];
      N weight[kCorners];
      if (corners > 1) {
        places.Weigh(args, level, i, sides);
        CornerWeights<D>(sides, weight);
      }
      for (int k = 0; k < args.features; ++k) {
        const N bar = work.ct.At(k, i);
        for (int b = 0; b < corners; ++b) {
          const V part = corners == 1 ? Result(bar) : Result(weight[b] * bar);
          // What is infinite becomes NaN, as where a corner of weight 0 meets it.
          (part + (part - part)).Store(work.parts[k * kCorners + b] + i);
        }
      }
    }
  }

  KNN_CALLED static void AddParts(const Args& args, const Places& places, const Work& work, double* sums) {
    const Chunk& chunk = *places.chunk;
    WithFeatures(args, [&](auto features) {
      constexpr int F = features;
      for (int i = 0; i < chunk.n; ++i) {
        if (!chunk.reaches[i]) continue;
        for (int b = 0; b < chunk.corners; ++b) {
          double* row = sums + int64_t{places.row[b][i]} * F;
          for (int k = 0; k < F; ++k) row[k] += work.parts[k * kCorners + b][i];
        }
      }
    });
  }

  static constexpr CpuKernel<Args> kKernel = {
      &ScratchBytes, {{&BeginTasks, &Begin}, {&PointTasks, &Points}, {&LevelTasks, &SumLevel}, {nullptr, nullptr}}};
};

}  // namespace

template <class T, class S>
CpuKernel<HashGrid<T, S>> HashGridKernel(const HashGrid<T, S>& args) {
  const auto of = [&](auto dim) {
    constexpr int D = decltype(dim)::value;
    return HasTangents(args) ? Grid<T, S, true, D>::kKernel : Grid<T, S, false, D>::kKernel;
  };
  return args.dim == 2   ? of(std::integral_constant<int, 2>())
         : args.dim == 3 ? of(std::integral_constant<int, 3>())
                         : of(std::integral_constant<int, 4>());
}
template CpuKernel<HashGrid<float, float>> HashGridKernel(const HashGrid<float, float>&);
template CpuKernel<HashGrid<double, double>> HashGridKernel(const HashGrid<double, double>&);
template CpuKernel<HashGrid<float, Float16>> HashGridKernel(const HashGrid<float, Float16>&);

}  // namespace knn::KNN_ISA
