// Gaussians by tile, and their blending, on CPUs.
//
// A task blends a tile: it goes through the tile's Gaussians and for each through the rows of pixels that it may touch,
// a SIMD vector of pixels at a time, whose state stays in the first-level cache. Backward it goes through them from the
// last to the first, sums for each what its pixels say, and leaves that in the slot of the pair; then the slots of each
// Gaussian, which are neighbours, are added in their order: the same bits whatever threads do. Where there are more
// pairs than the lists hold, tiles ask every Gaussian whether it may count, and some of the tiles at a time add to sums
// of their own for all Gaussians.

#include "splat/cpu.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "common/simd_math.h"
#include "splat/formulas.h"

namespace knn::KNN_ISA {
namespace {

constexpr int64_t kSome = 1024;  // Gaussians of a task

template <class Args>
int64_t Parts(const Args& args) {
  return CeilDiv(args.P, kSome);
}
template <class Args>
int64_t GaussianTasks(const Args& args) {
  return Count(args.batch) * Parts(args);
}
template <class Args>
int64_t EntryTasks(const Args& args) {
  return Count(args.batch);
}

// ---- Lists

template <class T>
struct List {
  using Args = Tiles<T>;

  // Scratch of an entry: keys and numbers twice, for sorting; then the tile of each slot.
  static int64_t WordsOfEntry(const Args& args) { return Max(4 * args.P, args.capacity); }
  static int64_t ScratchBytes(const Args& args) { return Count(args.batch) * WordsOfEntry(args) * 4; }
  static int32_t* ScratchOf(const Args& args, void* scratch, int64_t b) {
    return static_cast<int32_t*>(scratch) + b * WordsOfEntry(args);
  }

  // Orders as numbers, −0 as 0, NaN last.
  static uint32_t Key(float depth) {
    if (depth != depth) return ~0u;
    const uint32_t bits = FloatToBits(depth + 0.0f);
    return bits >> 31 != 0 ? ~bits : bits | 1u << 31;
  }

  static void Sort(const Args& args, void* scratch, int64_t b) {
    constexpr int kBits = 11, kBuckets = 1 << kBits;
    const float* depths = At(args.depths, args.batch, b);
    uint32_t* keys = reinterpret_cast<uint32_t*>(ScratchOf(args, scratch, b));
    uint32_t* other_keys = keys + args.P;
    int32_t* numbers = reinterpret_cast<int32_t*>(other_keys + args.P);
    int32_t* other_numbers = numbers + args.P;
    for (int64_t i = 0; i < args.P; ++i) keys[i] = Key(depths[i]), numbers[i] = static_cast<int32_t>(i);
    for (int shift = 0; shift < 32; shift += kBits) {
      uint32_t begin[kBuckets + 1] = {};
      for (int64_t i = 0; i < args.P; ++i) ++begin[(keys[i] >> shift & (kBuckets - 1)) + 1];
      for (int k = 0; k < kBuckets; ++k) begin[k + 1] += begin[k];
      for (int64_t i = 0; i < args.P; ++i) {
        const uint32_t to = begin[keys[i] >> shift & (kBuckets - 1)]++;
        other_keys[to] = keys[i], other_numbers[to] = numbers[i];
      }
      std::swap(keys, other_keys);
      std::swap(numbers, other_numbers);
    }
    std::copy_n(numbers, args.P, At(args.lists.order, args.batch, b));
  }

  static Footprint<T> Of(const Args& args, int64_t b, int64_t g) {
    const int32_t* reach = AtOrNull(args.reach, args.batch, b);
    return FootprintOf(args.screen, At(args.means, args.batch, b) + 2 * g, At(args.conics, args.batch, b) + 3 * g,
                       At(args.opacities, args.batch, b)[g], reach == nullptr ? nullptr : reach + 4 * g);
  }

  // Calls run(rank, Gaussian, tile) for the pairs of a task's Gaussians, in the order of slots.
  template <class F>
  static void ForEachPair(const Args& args, int64_t task, F&& run) {
    const int64_t b = task / Parts(args), begin = task % Parts(args) * kSome, end = Min(begin + kSome, args.P);
    const int32_t* order = At(args.lists.order, args.batch, b);
    for (int64_t r = begin; r < end; ++r) {
      const Footprint<T> f = Of(args, b, order[r]);
      for (int row = f.y0; row < f.y1; ++row) {
        const Columns columns = ColumnsOf(f, args.screen, row);
        for (int column = columns.from; column < columns.to; ++column) {
          run(r, order[r], row * TileColumns(args.screen) + column);
        }
      }
    }
  }

  static void CountPairs(const Args& args, void* /*scratch*/, int64_t task) {
    const int64_t b = task / Parts(args), begin = task % Parts(args) * kSome, end = Min(begin + kSome, args.P);
    int32_t* counts = At(args.lists.offsets, args.batch, b) + 1;
    std::fill(counts + begin, counts + end, 0);
    ForEachPair(args, task, [&](int64_t r, int32_t, int32_t) { ++counts[r]; });
  }

  static void SumCounts(const Args& args, void* /*scratch*/, int64_t b) {
    int32_t* offsets = At(args.lists.offsets, args.batch, b);
    offsets[0] = 0;
    for (int64_t r = 0; r < args.P; ++r) {
      offsets[r + 1] = static_cast<int32_t>(Min(int64_t{offsets[r]} + offsets[r + 1], INT32_MAX));
    }
  }

  static bool Fits(const Args& args, int64_t b) {
    return At(args.lists.offsets, args.batch, b)[args.P] <= args.capacity;
  }

  static void FindPairs(const Args& args, void* scratch, int64_t task) {
    const int64_t b = task / Parts(args);
    if (!Fits(args, b)) return;
    const int32_t* offsets = At(args.lists.offsets, args.batch, b);
    int32_t *owners = At(args.lists.owners, args.batch, b), *tiles = ScratchOf(args, scratch, b);
    int64_t slot = offsets[task % Parts(args) * kSome];
    ForEachPair(args, task, [&](int64_t, int32_t g, int32_t tile) { owners[slot] = g, tiles[slot++] = tile; });
  }

  static void SortPairs(const Args& args, void* scratch, int64_t b) {
    const int count = TileCount(args.screen);
    int32_t *slots = At(args.lists.slots, args.batch, b), *ends = At(args.lists.ends, args.batch, b);
    std::fill_n(ends, count, 0);
    if (!Fits(args, b)) return;
    const int32_t pairs = At(args.lists.offsets, args.batch, b)[args.P], *tiles = ScratchOf(args, scratch, b);
    for (int32_t s = 0; s < pairs; ++s) ++ends[tiles[s]];
    for (int32_t t = 0, sum = 0; t < count; ++t) {
      const int32_t begin = sum;
      sum += ends[t], ends[t] = begin;
    }
    for (int32_t s = 0; s < pairs; ++s) slots[ends[tiles[s]]++] = s;
  }
};

// ---- Blending

// A vector where `which` says so, else another; also of dual numbers.
template <class T, class Which>
KNN_FN Dual<Vec<T>> Select(Which which, Dual<Vec<T>> a, Dual<Vec<T>> b) {
  return {Select(which, a.value, b.value), Select(which, a.tangent, b.tangent)};
}
template <class T>
KNN_FN Dual<Vec<T>> ExpOfNegative(Dual<Vec<T>> x) {
  const Vec<T> e = ExpOfNegative(x.value);
  return {e, e * x.tangent};
}
template <class T, class Bits>
KNN_FN bool Any(Bits which) {
  const Vec<T> zero = {}, one = Vec<T>::Broadcast(1);
  return LessEqualMask(one, Select(which, one, zero)) != 0;
}

// S is T or Dual<T>; kFixed channels, or any number where it is 0.
template <class T, class S, int kFixed>
struct Blend {
  using Args = Splat<T>;
  static constexpr bool kDual = !std::is_same_v<S, T>;
  using V = Vec<T>;
  using N = std::conditional_t<kDual, Dual<V>, V>;
  using Bits = decltype(V().v < V().v);
  static constexpr int kPixels = kTile * kTile, kVectors = kPixels / V::kLanes, kOfRow = kTile / V::kLanes;
  static constexpr int kBlock = kFixed > 0 ? kFixed : 32;  // channels that a walk takes; more take more walks

  static KNN_FN N Broadcast(S x) {
    if constexpr (kDual) {
      return {V::Broadcast(x.value), V::Broadcast(x.tangent)};
    } else {
      return V::Broadcast(x);
    }
  }
  static KNN_FN S SumOf(N x) {
    if constexpr (kDual) {
      return {Sum(x.value), Sum(x.tangent)};
    } else {
      return Sum(x);
    }
  }
  static KNN_FN N Moved(V x) {  // does not move
    if constexpr (kDual) {
      return {x, V{}};
    } else {
      return x;
    }
  }
  // The vector that starts at a[i], and its tangent `step` elements on.
  static KNN_FN N Load(const T* a, int64_t i, int64_t step) {
    if constexpr (kDual) {
      return {V::Load(a + i), V::Load(a + step + i)};
    } else {
      return V::Load(a + i);
    }
  }
  static KNN_FN T& Part(S& x, bool tangent) {
    if constexpr (kDual) {
      return tangent ? x.tangent : x.value;
    } else {
      return x;
    }
  }

  // A Gaussian as walks want it: one place in memory instead of three.
  struct Packed {
    Flat<S> flat;
    T least_q;      // where q is less it does not count, whatever is rounded
    T half_height;  // of the rows in which it may count
  };

  static Packed* PackedOf(const Args& args, void* scratch, int64_t b) {
    return static_cast<Packed*>(scratch) + b * args.P;
  }
  static int64_t PackedBytes(const Args& args) { return CeilDiv(Count(args.batch) * args.P * sizeof(Packed), 64) * 64; }

  static void Pack(const Args& args, void* scratch, int64_t task) {
    const int64_t b = task / Parts(args), begin = task % Parts(args) * kSome, end = Min(begin + kSome, args.P);
    const Row<S, T> means(args.means, args.batch, b), conics(args.conics, args.batch, b);
    const Row<S, T> opacities(args.opacities, args.batch, b);
    Packed* packed = PackedOf(args, scratch, b);
    for (int64_t g = begin; g < end; ++g) {
      Flat<S> flat = {
          means[2 * g], means[2 * g + 1], Scale(0.5, conics[3 * g]), conics[3 * g + 1], Scale(0.5, conics[3 * g + 2]),
          opacities[g]};
      const T mean[2] = {ValueOf(flat.x), ValueOf(flat.y)};
      const T conic[3] = {2 * ValueOf(flat.half_a), ValueOf(flat.b), 2 * ValueOf(flat.half_c)};
      const Footprint<T> f = FootprintOf(args.screen, mean, conic, ValueOf(flat.opacity), nullptr);
      packed[g] = {flat, -Log(255 * ValueOf(flat.opacity)) - T(1e-3), f.half_y};
    }
  }

  // The Gaussians that may count in a tile, front to back: those that are listed, or all.
  struct Walk {
    const Args& args;
    const int64_t b;
    const int column, row;
    const int32_t *order, *owners, *slots, *reach;
    const Packed* packed;
    const bool listed;
    int64_t begin, count;

    Walk(const Args& args, void* scratch, int64_t b, int tile)
        : args(args),
          b(b),
          column(tile % TileColumns(args.screen)),
          row(tile / TileColumns(args.screen)),
          order(At(args.lists.order, args.batch, b)),
          owners(At(args.lists.owners, args.batch, b)),
          slots(At(args.lists.slots, args.batch, b)),
          reach(AtOrNull(args.reach, args.batch, b)),
          packed(PackedOf(args, scratch, b)),
          listed(Listed(args, b)) {
      const int32_t* ends = At(args.lists.ends, args.batch, b);
      begin = listed && tile > 0 ? ends[tile - 1] : 0;
      count = listed ? ends[tile] - begin : args.P;
    }

    int64_t Slot(int64_t k) const { return slots[begin + k]; }
    // The k-th; −1 if it does not count in the tile.
    int64_t operator[](int64_t k) const {
      if (listed) return owners[slots[begin + k]];
      const int64_t g = order[k];
      const Flat<S>& flat = packed[g].flat;
      const T mean[2] = {ValueOf(flat.x), ValueOf(flat.y)};
      const T conic[3] = {2 * ValueOf(flat.half_a), ValueOf(flat.b), 2 * ValueOf(flat.half_c)};
      const Footprint<T> f =
          FootprintOf(args.screen, mean, conic, ValueOf(flat.opacity), reach == nullptr ? nullptr : reach + 4 * g);
      if (row < f.y0 || row >= f.y1) return -1;
      const Columns columns = ColumnsOf(f, args.screen, row);
      return columns.from <= column && column < columns.to ? g : -1;
    }
  };

  static bool Listed(const Args& args, int64_t b) {
    return At(args.lists.offsets, args.batch, b)[args.P] <= args.capacity;
  }

  // What a Gaussian covers of some pixels.
  struct Cover {
    N dx, raw, alpha;
    Bits counts, saturates;
    bool any;
  };

  // Of a row of pixels.
  struct OnRow {
    N dy, b_dy, c_dy;
    OnRow(const Flat<N>& g, T y) : dy(g.y - Moved(V::Broadcast(y))), b_dy(g.b * dy), c_dy(g.half_c * dy * dy) {}
  };

  static KNN_FN Cover Covers(const Flat<N>& g, const OnRow& row, V x, V least_q) {
    Cover c;
    c.dx = g.x - Moved(x);
    const N q = Exponent(g, c.dx, row.b_dy, row.c_dy);
    c.any = LessEqualMask(least_q, ValueOf(q)) != 0;
    if (!c.any) return c;
    const V zero = {}, most = V::Broadcast(static_cast<T>(kMostAlpha));
    const Bits negative = ValueOf(q).v <= zero.v;
    c.raw = g.opacity * ExpOfNegative(Select(negative, q, Moved(zero)));
    c.counts = negative & (ValueOf(c.raw).v >= V::Broadcast(static_cast<T>(kLeastAlpha)).v);
    c.saturates = !(ValueOf(c.raw).v < most.v);
    c.alpha = Select(c.saturates, Moved(most), c.raw);
    return c;
  }

  static KNN_FN Flat<N> Spread(const Flat<S>& f) {
    return {Broadcast(f.x), Broadcast(f.y),      Broadcast(f.half_a),
            Broadcast(f.b), Broadcast(f.half_c), Broadcast(f.opacity)};
  }

  // Rows of a tile in which a Gaussian may count.
  static KNN_FN void RowsOf(const Packed& g, T top, int& from, int& to) {
    const T y = ValueOf(g.flat.y) - top;  // from the upper edge of the tile
    const T first = y - g.half_height - 1, last = y + g.half_height + 1;
    from = first > 0 ? (first < kTile ? static_cast<int>(first) : kTile) : 0;
    to = last < kTile ? (last > 0 ? static_cast<int>(last) : 0) : kTile;
  }

  static int64_t TileTasks(const Args& args) { return Count(args.batch) * TileCount(args.screen); }
  static int Channels(const Args& args) { return kFixed > 0 ? kFixed : args.channel_count; }

  // ---- Forward

  static int64_t ForwardBytes(const Args& args) { return PackedBytes(args); }

  static void Forward(const Args& args, void* scratch, int64_t task) {
    const int64_t b = task / TileCount(args.screen);
    const Walk walk(args, scratch, b, static_cast<int>(task % TileCount(args.screen)));
    for (int first = 0; first < Channels(args); first += kBlock) ForwardBlock(args, walk, first);
  }

  static void ForwardBlock(const Args& args, const Walk& walk, int first) {
    const int C = Channels(args), block = kFixed > 0 ? kFixed : static_cast<int>(Min(kBlock, C - first));
    const int left = walk.column * kTile, top = walk.row * kTile;
    const int columns = static_cast<int>(Min(kTile, args.screen.width - left));
    const int rows = static_cast<int>(Min(kTile, args.screen.height - top));
    const Row<S, T> channels(args.channels, args.batch, walk.b), background(args.background, args.batch, walk.b);
    const V zero = {}, one = V::Broadcast(1), limit = V::Broadcast(static_cast<T>(kLeastThrough));

    N image[kBlock * kVectors], through[kVectors];
    V open[kVectors];  // 1 where a pixel goes on
    Bits last[kVectors];
    bool goes_on[kVectors];
    for (int c = 0; c < block; ++c) {
      for (int v = 0; v < kVectors; ++v) image[c * kVectors + v] = Moved(zero);
    }
    int going = 0;
    for (int v = 0; v < kVectors; ++v) {
      const V column = V::Ramp() + V::Broadcast(static_cast<T>(v % kOfRow * V::kLanes));
      through[v] = Moved(one);
      open[v] = Select((column.v < V::Broadcast(static_cast<T>(columns)).v), one, zero);
      if (v / kOfRow >= rows) open[v] = zero;
      last[v] = Bits{};
      goes_on[v] = LessEqualMask(one, open[v]) != 0;
      going += goes_on[v];
    }

    for (int64_t k = 0; k < walk.count && going > 0; ++k) {
      const int64_t gaussian = walk[k];
      if (gaussian < 0) continue;
      const Packed& packed = walk.packed[gaussian];
      const Flat<N> g = Spread(packed.flat);
      const V least_q = V::Broadcast(packed.least_q);
      int from, to;
      RowsOf(packed, static_cast<T>(top), from, to);
      for (int row = from; row < to; ++row) {
        const OnRow on_row(g, static_cast<T>(top + row) + T(0.5));
        for (int part = 0; part < kOfRow; ++part) {
          const int v = row * kOfRow + part;
          if (!goes_on[v]) continue;
          const V x = V::Ramp() + V::Broadcast(static_cast<T>(left + part * V::kLanes) + T(0.5));
          const Cover cover = Covers(g, on_row, x, least_q);
          if (!cover.any) continue;
          const N after = through[v] * (Moved(one) - cover.alpha);
          const Bits is_open = open[v].v > zero.v, passes = ValueOf(after).v >= limit.v;
          const Bits counts = cover.counts & is_open & passes, ends = cover.counts & is_open & ~passes;
          const N weight = Select(counts, cover.alpha * through[v], Moved(zero));
          through[v] = Select(counts, after, through[v]);
          for (int c = 0; c < block; ++c) {
            const N channel = Broadcast(channels[gaussian * C + first + c]);
            image[c * kVectors + v] = Fma(weight, channel, image[c * kVectors + v]);
          }
          last[v] = counts ? Bits{} + static_cast<int>(k + 1) : last[v];
          if (Any<T>(ends)) {
            open[v] = Select(ends, zero, open[v]);
            goes_on[v] = LessEqualMask(one, open[v]) != 0;
            going -= !goes_on[v];
          }
        }
      }
    }

    const int64_t pixels = int64_t{args.screen.width} * args.screen.height;
    T* ends = args.through_out + walk.b * pixels * (kDual ? 2 : 1);
    int32_t* lasts = args.last_out + walk.b * pixels;
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < columns; ++column) {
        const int v = row * kOfRow + column / V::kLanes, lane = column % V::kLanes;
        const int64_t pixel = int64_t{top + row} * args.screen.width + left + column;
        const S end = Lane(through[v], lane);
        for (int c = 0; c < block; ++c) {
          const S value = Fma(end, background[first + c], Lane(image[c * kVectors + v], lane));
          args.image[(walk.b * pixels + pixel) * C + first + c] = Result(value);
        }
        if (first > 0) continue;
        args.alpha[walk.b * pixels + pixel] = kDual ? -Result(end) : 1 - Result(end);
        ends[pixel] = ValueOf(end);
        if constexpr (kDual) ends[pixels + pixel] = end.tangent;
        lasts[pixel] = static_cast<int32_t>(last[v][lane]);
      }
    }
  }

  static KNN_FN S Lane(const N& x, int lane) {
    if constexpr (kDual) {
      return {x.value.v[lane], x.tangent.v[lane]};
    } else {
      return x.v[lane];
    }
  }

  // ---- Backward

  // A pair leaves gradients in mean, conic, opacity, and in the channels if they are wanted.
  static int64_t Width(const Args& args) { return kMoments + (args.channels_bar != nullptr ? Channels(args) : 0); }

  // Without lists: sums for all Gaussians, of so many groups of tiles.
  static int64_t Groups(const Args& args) {
    const int64_t most = (int64_t{1} << 24) / Max(1, args.P * Width(args));
    return Max(1, Min(Min(16, TileCount(args.screen)), most));
  }

  // Scratch: packed Gaussians; what pairs or groups leave, of each entry; what tiles leave for the background.
  static int64_t SumsOfEntry(const Args& args) {
    int64_t most = 0;
    for (int64_t b = 0; b < Count(args.batch); ++b) {
      const int64_t pairs = At(args.lists.offsets, args.batch, b)[args.P];
      most = Max(most, Listed(args, b) ? pairs : Groups(args) * args.P);
    }
    return most * Width(args);
  }
  struct Scratch {
    T *sums, *of_background;
    int64_t sums_of_entry;
    Scratch(const Args& args, void* scratch) : sums_of_entry(SumsOfEntry(args)) {
      sums = reinterpret_cast<T*>(static_cast<char*>(scratch) + PackedBytes(args));
      of_background = sums + Count(args.batch) * sums_of_entry;
    }
  };
  static int64_t BackwardBytes(const Args& args) {
    const int64_t sums = Count(args.batch) * SumsOfEntry(args), of_background = TileTasks(args) * Channels(args);
    return PackedBytes(args) + (sums + of_background) * static_cast<int64_t>(sizeof(T));
  }

  static int64_t GroupTasks(const Args& args) { return Count(args.batch) * Groups(args); }

  // With lists, a tile.
  static void BackwardTile(const Args& args, void* scratch, int64_t task) {
    const int64_t b = task / TileCount(args.screen);
    if (!Listed(args, b)) return;
    const Scratch at(args, scratch);
    const Walk walk(args, scratch, b, static_cast<int>(task % TileCount(args.screen)));
    Backward(args, walk, at.sums + b * at.sums_of_entry, at.of_background + task * Channels(args));
  }

  // Without lists, a group of tiles.
  static void BackwardGroup(const Args& args, void* scratch, int64_t task) {
    const int64_t b = task / Groups(args), group = task % Groups(args), tiles = TileCount(args.screen);
    if (Listed(args, b)) return;
    const Scratch at(args, scratch);
    const int64_t size = args.P * Width(args);
    T* sums = at.sums + b * at.sums_of_entry + group * size;
    std::fill_n(sums, size, T(0));
    for (int64_t tile = group * tiles / Groups(args); tile < (group + 1) * tiles / Groups(args); ++tile) {
      const Walk walk(args, scratch, b, static_cast<int>(tile));
      Backward(args, walk, sums, at.of_background + (b * tiles + tile) * Channels(args));
    }
  }

  static void Backward(const Args& args, const Walk& walk, T* sums, T* of_background) {
    if (walk.listed) {
      for (int64_t k = 0; k < walk.count; ++k) std::fill_n(sums + walk.Slot(k) * Width(args), Width(args), T(0));
    }
    for (int first = 0; first < Channels(args); first += kBlock) BackwardBlock(args, walk, first, sums, of_background);
  }

  static void BackwardBlock(const Args& args, const Walk& walk, int first, T* sums, T* of_background) {
    const int C = Channels(args), block = kFixed > 0 ? kFixed : static_cast<int>(Min(kBlock, C - first));
    const int64_t width = Width(args);
    const bool wants_channels = args.channels_bar != nullptr;
    const int left = walk.column * kTile, top = walk.row * kTile;
    const Row<S, T> channels(args.channels, args.batch, walk.b), background(args.background, args.batch, walk.b);
    const V zero = {}, one = V::Broadcast(1);

    N ct[kBlock * kVectors], through[kVectors], behind[kVectors];
    Bits last[kVectors];
    int32_t last_of[kVectors] = {};
    LoadPixels(args, walk, first, block, ct, through, behind, last, last_of);
    int32_t end = 0;
    for (int32_t l : last_of) end = std::max(end, l);

    for (int c = 0; c < block; ++c) {
      N sum = Moved(zero);
      for (int v = 0; v < kVectors; ++v) sum = Fma(through[v], ct[c * kVectors + v], sum);
      of_background[first + c] = Result(SumOf(sum));
      const N color = Broadcast(background[first + c]);
      for (int v = 0; v < kVectors; ++v) behind[v] = Fma(color, ct[c * kVectors + v], behind[v]);
    }
    for (int v = 0; v < kVectors; ++v) behind[v] = behind[v] * through[v];

    for (int64_t k = end - 1; k >= 0; --k) {
      const int64_t gaussian = walk[k];
      if (gaussian < 0) continue;
      const Packed& packed = walk.packed[gaussian];
      const Flat<N> g = Spread(packed.flat);
      const V least_q = V::Broadcast(packed.least_q);
      N moments[kMoments], channels_bar[kBlock];
      for (N& m : moments) m = Moved(zero);
      for (int c = 0; c < block; ++c) channels_bar[c] = Moved(zero);
      bool any = false;
      int from, to;
      RowsOf(packed, static_cast<T>(top), from, to);
      for (int row = from; row < to; ++row) {
        const OnRow on_row(g, static_cast<T>(top + row) + T(0.5));
        N of_row[3] = {Moved(zero), Moved(zero), Moved(zero)};  // q̄ times 1, dx, dx²
        bool any_in_row = false;
        for (int part = 0; part < kOfRow; ++part) {
          const int v = row * kOfRow + part;
          if (k >= last_of[v]) continue;
          const V x = V::Ramp() + V::Broadcast(static_cast<T>(left + part * V::kLanes) + T(0.5));
          const Cover cover = Covers(g, on_row, x, least_q);
          if (!cover.any) continue;
          any_in_row = true;
          const Bits counts = cover.counts & (last[v] > static_cast<int>(k));
          const N rest = Moved(one) / (Moved(one) - cover.alpha), before = through[v] * rest;
          const N weight = Select(counts, cover.alpha * before, Moved(zero));
          N u = Moved(zero);
          for (int c = 0; c < block; ++c) {
            const N g_c = ct[c * kVectors + v];
            u = Fma(Broadcast(channels[gaussian * C + first + c]), g_c, u);
            if (wants_channels) channels_bar[c] = Fma(weight, g_c, channels_bar[c]);
          }
          const N alpha_bar = rest * (through[v] * u - behind[v]);
          const N q_bar = Select(counts & ~cover.saturates, cover.raw * alpha_bar, Moved(zero));
          behind[v] = Fma(weight, u, behind[v]);
          through[v] = Select(counts, before, through[v]);
          const N q_dx = q_bar * cover.dx;
          of_row[0] = of_row[0] + q_bar;
          of_row[1] = of_row[1] + q_dx;
          of_row[2] = Fma(q_dx, cover.dx, of_row[2]);
        }
        if (!any_in_row) continue;
        any = true;
        const N q_dy = of_row[0] * on_row.dy;
        moments[0] = moments[0] + of_row[0];
        moments[1] = moments[1] + of_row[1];
        moments[2] = moments[2] + q_dy;
        moments[3] = moments[3] + of_row[2];
        moments[4] = Fma(of_row[1], on_row.dy, moments[4]);
        moments[5] = Fma(q_dy, on_row.dy, moments[5]);
      }
      if (!any) continue;
      S sum_of[kMoments], bar[kMoments];
      for (int m = 0; m < kMoments; ++m) sum_of[m] = SumOf(moments[m]);
      FromMoments(packed.flat, sum_of, bar);
      T* out = sums + (walk.listed ? walk.Slot(k) : gaussian) * width;
      for (int m = 0; m < kMoments; ++m) out[m] += Result(bar[m]);
      if (wants_channels) {
        for (int c = 0; c < block; ++c) out[kMoments + first + c] += Result(SumOf(channels_bar[c]));
      }
    }
  }

  // Of a tile's pixels: cotangents of the block's channels, what is left at the end, that of alpha (negative; once),
  // and where they end. Pixels outside of the image end at once.
  static void LoadPixels(const Args& args, const Walk& walk, int first, int block, N* ct, N* through, N* behind,
                         Bits* last, int32_t* last_of) {
    const int C = Channels(args), left = walk.column * kTile, top = walk.row * kTile;
    const int64_t pixels = int64_t{args.screen.width} * args.screen.height;
    const T* ends = At(args.through, args.batch, walk.b);
    const int32_t* lasts = At(args.last, args.batch, walk.b);
    const Cotangent<S, T> image_ct(args.image_ct, args.batch, walk.b), alpha_ct(args.alpha_ct, args.batch, walk.b);
    const bool has_image = image_ct.given(), has_alpha = first == 0 && alpha_ct.given();
    for (int v = 0; v < kVectors; ++v) {
      S lane_ct[kBlock][V::kLanes] = {}, lane_through[V::kLanes] = {}, lane_alpha[V::kLanes] = {};
      last[v] = Bits{};
      for (int lane = 0; lane < V::kLanes; ++lane) {
        const int x = left + v % kOfRow * V::kLanes + lane, y = top + v / kOfRow;
        if (x >= args.screen.width || y >= args.screen.height) continue;
        const int64_t pixel = int64_t{y} * args.screen.width + x;
        for (int c = 0; has_image && c < block; ++c) lane_ct[c][lane] = image_ct[pixel * C + first + c];
        if (has_alpha) lane_alpha[lane] = -alpha_ct[pixel];
        Part(lane_through[lane], false) = ends[pixel];
        if constexpr (kDual) Part(lane_through[lane], true) = ends[pixels + pixel];
        last[v][lane] = lasts[pixel];
        last_of[v] = std::max(last_of[v], lasts[pixel]);
      }
      for (int c = 0; c < block; ++c) ct[c * kVectors + v] = FromLanes(lane_ct[c]);
      through[v] = FromLanes(lane_through);
      behind[v] = FromLanes(lane_alpha);
    }
  }

  static KNN_FN N FromLanes(const S (&lanes)[V::kLanes]) {
    N x = Moved(V{});
    for (int l = 0; l < V::kLanes; ++l) {
      if constexpr (kDual) {
        x.value.v[l] = lanes[l].value, x.tangent.v[l] = lanes[l].tangent;
      } else {
        x.v[l] = lanes[l];
      }
    }
    return x;
  }

  static void SumPairs(const Args& args, void* scratch, int64_t task) {
    const int64_t b = task / Parts(args), begin = task % Parts(args) * kSome, end = Min(begin + kSome, args.P);
    const Scratch at(args, scratch);
    const T* sums = at.sums + b * at.sums_of_entry;
    const int32_t *order = At(args.lists.order, args.batch, b), *offsets = At(args.lists.offsets, args.batch, b);
    const bool listed = Listed(args, b);
    const int64_t width = Width(args), C = Channels(args);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t g = order[r], at_g = b * args.P + g;
      const T* from = listed ? sums + offsets[r] * width : sums + g * width;
      const int64_t terms = listed ? offsets[r + 1] - offsets[r] : Groups(args), step = listed ? width : args.P * width;
      const auto sum = [&](int64_t i) {
        double total = 0;
        for (int64_t t = 0; t < terms; ++t) total += from[t * step + i];
        return static_cast<T>(total);
      };
      for (int i = 0; args.means_bar != nullptr && i < 2; ++i) args.means_bar[at_g * 2 + i] = sum(i);
      for (int i = 0; args.conics_bar != nullptr && i < 3; ++i) args.conics_bar[at_g * 3 + i] = sum(2 + i);
      if (args.opacities_bar != nullptr) args.opacities_bar[at_g] = sum(5);
      for (int64_t i = 0; args.channels_bar != nullptr && i < C; ++i)
        args.channels_bar[at_g * C + i] = sum(kMoments + i);
    }
  }

  static void SumTiles(const Args& args, void* scratch, int64_t b) {
    if (args.background_bar == nullptr) return;
    const int64_t C = Channels(args), tiles = TileCount(args.screen);
    const T* of_tiles = Scratch(args, scratch).of_background + b * tiles * C;
    for (int64_t c = 0; c < C; ++c) {
      double total = 0;
      for (int64_t t = 0; t < tiles; ++t) total += of_tiles[t * C + c];
      args.background_bar[b * C + c] = static_cast<T>(total);
    }
  }

  static constexpr CpuKernel<Args> kForward = {
      &ForwardBytes, {{&GaussianTasks<Args>, &Pack}, {&TileTasks, &Forward}, {nullptr, nullptr}}};
  static constexpr CpuKernel<Args> kBackward = {&BackwardBytes,
                                                {{&GaussianTasks<Args>, &Pack},
                                                 {&TileTasks, &BackwardTile},
                                                 {&GroupTasks, &BackwardGroup},
                                                 {&GaussianTasks<Args>, &SumPairs},
                                                 {&EntryTasks<Args>, &SumTiles},
                                                 {nullptr, nullptr}}};
};

// Colours and depth are four channels.
template <class T, class Pick>
CpuKernel<Splat<T>> WithTypes(const Splat<T>& args, Pick&& pick) {
  if (args.channel_count == 4) return args.dual ? pick(Blend<T, Dual<T>, 4>()) : pick(Blend<T, T, 4>());
  return args.dual ? pick(Blend<T, Dual<T>, 0>()) : pick(Blend<T, T, 0>());
}

}  // namespace

template <class T>
CpuKernel<Tiles<T>> TilesKernel() {
  using L = List<T>;
  using Args = Tiles<T>;
  return {&L::ScratchBytes,
          {{&EntryTasks<Args>, &L::Sort},
           {&GaussianTasks<Args>, &L::CountPairs},
           {&EntryTasks<Args>, &L::SumCounts},
           {&GaussianTasks<Args>, &L::FindPairs},
           {&EntryTasks<Args>, &L::SortPairs},
           {nullptr, nullptr}}};
}
template CpuKernel<Tiles<float>> TilesKernel();
template CpuKernel<Tiles<double>> TilesKernel();

template <class T>
CpuKernel<Splat<T>> SplatForwardKernel(const Splat<T>& args) {
  return WithTypes(args, [](auto blend) { return decltype(blend)::kForward; });
}
template CpuKernel<Splat<float>> SplatForwardKernel(const Splat<float>&);
template CpuKernel<Splat<double>> SplatForwardKernel(const Splat<double>&);

template <class T>
CpuKernel<Splat<T>> SplatBackwardKernel(const Splat<T>& args) {
  return WithTypes(args, [](auto blend) { return decltype(blend)::kBackward; });
}
template CpuKernel<Splat<float>> SplatBackwardKernel(const Splat<float>&);
template CpuKernel<Splat<double>> SplatBackwardKernel(const Splat<double>&);

}  // namespace knn::KNN_ISA
