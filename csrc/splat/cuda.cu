// Gaussians by tile, and their blending, on CUDA.
//
// Lists: Gaussians are sorted by depth; each counts its tiles; running sums say where its slots and, by rank, its pairs
// begin; it writes them; pairs, which are in the order of ranks, are sorted stably by tile. How many there are only the
// device knows: sorts are over all that lists have room for, and where there is too little room nobody writes pairs.
//
// Blending: a block has a tile and a thread a pixel; a warp has 8 x 4 pixels. Gaussians are staged in shared memory
// some at a time, and who stages one finds out which warps it may touch, so that warps go through those alone. Without
// lists the same kernels stage all Gaussians, and most touch no warp.
//
// Gradients: of some Gaussians, a warp notes what they are at each of its pixels; then a lane has a Gaussian, and a
// part of the pixels to sum over. The block sums over its warps, in their order, and writes to the pair's slot; slots
// of a Gaussian are neighbours and are summed in their order. Without lists there are no slots. Then blocks add whole
// numbers, which come to the same sum in any order: multiples of a step that is found from the largest of a Gaussian's
// terms, in a pass before.

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <type_traits>

#include "common/cuda.cuh"
#include "splat/cuda.h"
#include "splat/formulas.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kThreads = kTile * kTile, kWarps = kThreads / kWarp;
constexpr int kWarpColumns = 8, kWarpRows = 4;  // pixels of a warp

unsigned Blocks(int64_t threads) { return static_cast<unsigned>(CeilDiv(threads, kThreads)); }

// ---- Lists

// What the kernels below take: one batch entry.
template <class T>
struct Entry {
  int64_t P, capacity;
  Screen screen;
  const T *means, *conics, *opacities;
  const float* depths;
  const int32_t* reach;
  int32_t *order, *offsets, *owners, *slots, *ends;

  Entry(const Tiles<T>& a, int64_t b)
      : P(a.P),
        capacity(a.capacity),
        screen(a.screen),
        means(At(a.means, a.batch, b)),
        conics(At(a.conics, a.batch, b)),
        opacities(At(a.opacities, a.batch, b)),
        depths(At(a.depths, a.batch, b)),
        reach(AtOrNull(a.reach, a.batch, b)),
        order(At(a.lists.order, a.batch, b)),
        offsets(At(a.lists.offsets, a.batch, b)),
        owners(At(a.lists.owners, a.batch, b)),
        slots(At(a.lists.slots, a.batch, b)),
        ends(At(a.lists.ends, a.batch, b)) {}
};

// Order as numbers, −0 as 0, NaN last.
template <class T>
__global__ void DepthKeys(const __grid_constant__ Entry<T> e, uint32_t* keys, int32_t* numbers) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= e.P) return;
  const float depth = e.depths[i];
  const uint32_t bits = FloatToBits(depth == 0 ? 0.0f : depth);
  keys[i] = depth != depth ? ~0u : bits >> 31 != 0 ? ~bits : bits | 1u << 31;
  numbers[i] = static_cast<int32_t>(i);
}

template <class T>
__device__ Footprint<T> FootprintOfGaussian(const Entry<T>& e, int64_t g) {
  return FootprintOf(e.screen, e.means + 2 * g, e.conics + 3 * g, e.opacities[g],
                     e.reach == nullptr ? nullptr : e.reach + 4 * g);
}

// Calls run(lane, g, n, row, columns) for each row of tiles of each lane's Gaussian g, none if that is negative, `n`
// pairs of it being in rows above, and returns how many it has. Of one with many rows, the lanes of the warp take one
// each.
template <class T, class F>
__device__ int ForEachRow(const Entry<T>& e, int32_t g, F&& run) {
  constexpr int kFew = 6;
  const int lane = threadIdx.x % kWarp;
  int rows = 0, found = 0;
  if (g >= 0) {
    const Footprint<T> f = FootprintOfGaussian(e, g);
    rows = f.empty() ? 0 : f.y1 - f.y0;
    for (int row = f.y0; row < f.y1 && rows <= kFew && rows > 0; ++row) {
      const Columns columns = ColumnsOf(f, e.screen, row);
      run(lane, g, found, row, columns);
      found += columns.to - columns.from;
    }
  }
  for (unsigned many = __ballot_sync(kFullMask, rows > kFew); many != 0; many &= many - 1) {
    const int of = __ffs(many) - 1;
    const int32_t shared = __shfl_sync(kFullMask, g, of);
    const Footprint<T> f = FootprintOfGaussian(e, shared);
    int count = 0;
    for (int first = f.y0; first < f.y1; first += kWarp) {
      const int row = first + lane;
      Columns columns = {0, 0};
      if (row < f.y1) columns = ColumnsOf(f, e.screen, row);
      int up_to = columns.to - columns.from;  // those in rows above, and in this one
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int above = __shfl_up_sync(kFullMask, up_to, step);
        if (lane >= step) up_to += above;
      }
      run(of, shared, count + up_to - (columns.to - columns.from), row, columns);
      count += __shfl_sync(kFullMask, up_to, kWarp - 1);
    }
    if (lane == of) found = count;
  }
  return found;
}

template <class T>
__global__ void __launch_bounds__(kThreads) CountPairs(const __grid_constant__ Entry<T> e) {
  const int64_t g = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int count = ForEachRow(e, g < e.P ? static_cast<int32_t>(g) : -1, [](int, int32_t, int, int, Columns) {});
  if (g < e.P) e.offsets[g + 1] = count;
  if (g == 0) e.offsets[0] = 0;
}

// The same by rank; and the owners of slots.
template <class T>
__global__ void __launch_bounds__(kThreads) CountByRank(const __grid_constant__ Entry<T> e, int32_t* starts) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < e.P) starts[i + 1] = e.offsets[e.order[i] + 1] - e.offsets[e.order[i]];
  if (i == 0) starts[0] = 0;
  if (e.offsets[e.P] > e.capacity) return;
  const int lane = threadIdx.x % kWarp;
  const int32_t begin = i < e.P ? e.offsets[i] : 0, end = i < e.P ? e.offsets[i + 1] : 0;
  for (int of = 0; of < kWarp; ++of) {
    const int32_t to = __shfl_sync(kFullMask, end, of);
    for (int32_t slot = __shfl_sync(kFullMask, begin, of) + lane; slot < to; slot += kWarp) {
      e.owners[slot] = static_cast<int32_t>(i - lane + of);
    }
  }
}

// Of numbers that are not negative; what would be too large is the largest.
struct SaturatingSum {
  __host__ __device__ int32_t operator()(int32_t a, int32_t b) const { return a > INT32_MAX - b ? INT32_MAX : a + b; }
};

cudaError_t SumUp(int32_t* counts, int64_t count, void* scratch, int64_t bytes, cudaStream_t stream) {
  size_t needed = 0;
  cudaError_t error = cub::DeviceScan::InclusiveScan(nullptr, needed, counts, counts, SaturatingSum(), count, stream);
  if (error != cudaSuccess) return error;
  if (static_cast<int64_t>(needed) > bytes) return cudaErrorMemoryAllocation;
  return cub::DeviceScan::InclusiveScan(scratch, needed, counts, counts, SaturatingSum(), count, stream);
}

template <class Key>
__global__ void EmptyPairs(int64_t capacity, Key none, Key* keys) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < capacity) keys[i] = none;
}

// Pairs by rank, then by tile: their tiles, and their slots.
template <class T, class Key>
__global__ void __launch_bounds__(kThreads)
    WritePairs(const __grid_constant__ Entry<T> e, const int32_t* starts, Key* keys) {
  if (e.offsets[e.P] > e.capacity) return;
  const int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x, of_warp = r - threadIdx.x % kWarp;
  const int columns_of_screen = TileColumns(e.screen);
  ForEachRow(e, r < e.P ? e.order[r] : -1, [&](int lane, int32_t g, int n, int row, Columns columns) {
    const int64_t at = starts[of_warp + lane] + n, slot = e.offsets[g] + n;
    for (int i = 0; i < columns.to - columns.from; ++i) {
      keys[at + i] = static_cast<Key>(row * columns_of_screen + columns.from + i);
      e.slots[at + i] = static_cast<int32_t>(slot + i);
    }
  });
}

template <class T, class Key>
__global__ void FindEnds(const __grid_constant__ Entry<T> e, const Key* keys) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i > e.capacity) return;
  const int tiles = TileCount(e.screen);
  const int before = i == 0 ? 0 : keys[i - 1], after = i == e.capacity ? tiles : keys[i];
  for (int tile = before; tile < after; ++tile) e.ends[tile] = static_cast<int32_t>(i);
}

// Sorts by the lowest bits of keys, stably. Numbers end up where they were after an even number of passes, as 32 bits
// take, and those of most images' tiles.
template <class Key>
cudaError_t Sort(cub::DoubleBuffer<Key>& keys, cub::DoubleBuffer<int32_t>& numbers, int64_t count, int bits,
                 void* scratch, int64_t bytes, cudaStream_t stream) {
  size_t needed = 0;
  cudaError_t error = cub::DeviceRadixSort::SortPairs(nullptr, needed, keys, numbers, count, 0, bits, stream);
  if (error != cudaSuccess) return error;
  if (static_cast<int64_t>(needed) > bytes) return cudaErrorMemoryAllocation;
  return cub::DeviceRadixSort::SortPairs(scratch, needed, keys, numbers, count, 0, bits, stream);
}

// What was sorted, to `to`, one of the two buffers.
cudaError_t Settle(cub::DoubleBuffer<int32_t>& numbers, int32_t* to, int64_t count, cudaStream_t stream) {
  if (numbers.Current() == to) return cudaSuccess;
  return cudaMemcpyAsync(to, numbers.Current(), count * sizeof(int32_t), cudaMemcpyDeviceToDevice, stream);
}

template <class T, class Key>
cudaError_t ListPairs(const Entry<T>& e, char* scratch, int64_t bytes, cudaStream_t stream) {
  const int tiles = TileCount(e.screen);
  int bits = 1;
  while (tiles >> bits != 0) ++bits;
  auto* starts = reinterpret_cast<int32_t*>(scratch);
  auto* other_slots = starts + e.P + 1;
  auto* keys = reinterpret_cast<Key*>(other_slots + e.capacity);
  const int64_t words = e.P + 1 + e.capacity, of_keys = 2 * e.capacity * static_cast<int64_t>(sizeof(Key));
  const int64_t used = CeilDiv(4 * words + of_keys, 256) * 256;
  CountByRank<<<Blocks(e.P), kThreads, 0, stream>>>(e, starts);
  if (cudaError_t error = SumUp(starts + 1, e.P, scratch + used, bytes - used, stream); error != cudaSuccess) {
    return error;
  }
  EmptyPairs<<<Blocks(e.capacity), kThreads, 0, stream>>>(e.capacity, static_cast<Key>(tiles), keys);
  WritePairs<<<Blocks(e.P), kThreads, 0, stream>>>(e, starts, keys);
  cub::DoubleBuffer<Key> key_buffers(keys, keys + e.capacity);
  cub::DoubleBuffer<int32_t> number_buffers(e.slots, other_slots);
  if (cudaError_t error = Sort(key_buffers, number_buffers, e.capacity, bits, scratch + used, bytes - used, stream);
      error != cudaSuccess) {
    return error;
  }
  FindEnds<<<Blocks(e.capacity + 1), kThreads, 0, stream>>>(e, key_buffers.Current());
  return Settle(number_buffers, e.slots, e.capacity, stream);
}

template <class T>
cudaError_t ListEntry(const Entry<T>& e, char* scratch, int64_t bytes, cudaStream_t stream) {
  if (e.P == 0) {
    cudaError_t error = cudaMemsetAsync(e.offsets, 0, sizeof(int32_t), stream);
    if (error != cudaSuccess) return error;
    return cudaMemsetAsync(e.ends, 0, TileCount(e.screen) * sizeof(int32_t), stream);
  }
  auto* keys = reinterpret_cast<uint32_t*>(scratch);
  auto* other_order = reinterpret_cast<int32_t*>(keys + 2 * e.P);
  const int64_t used = CeilDiv(3 * e.P * 4, 256) * 256;
  DepthKeys<<<Blocks(e.P), kThreads, 0, stream>>>(e, keys, e.order);
  cub::DoubleBuffer<uint32_t> key_buffers(keys, keys + e.P);
  cub::DoubleBuffer<int32_t> number_buffers(e.order, other_order);
  cudaError_t error = Sort(key_buffers, number_buffers, e.P, 32, scratch + used, bytes - used, stream);
  if (error != cudaSuccess) return error;
  if (error = Settle(number_buffers, e.order, e.P, stream); error != cudaSuccess) return error;
  CountPairs<<<Blocks(e.P), kThreads, 0, stream>>>(e);
  if (error = SumUp(e.offsets + 1, e.P, scratch, bytes, stream); error != cudaSuccess) return error;
  return TileCount(e.screen) < 65536 ? ListPairs<T, uint16_t>(e, scratch, bytes, stream)
                                     : ListPairs<T, uint32_t>(e, scratch, bytes, stream);
}

// ---- Blending

template <class T>
__device__ __forceinline__ bool Listed(const Splat<T>& args, int64_t b) {
  return At(args.lists.offsets, args.batch, b)[args.P] <= args.capacity;
}

// A Gaussian in a tile, and the row that its gradients from there are left in: its slot, or without lists its own.
struct Member {
  int32_t owner, row;
};

// The Gaussians that may count in a tile, front to back: those that are listed, or all.
template <class T>
struct Walk {
  int column, row;
  bool listed;
  int32_t begin, count;
  const int32_t *order, *owners, *slots, *reach;

  __device__ Walk(const Splat<T>& args, int64_t b, int tile)
      : column(tile % TileColumns(args.screen)),
        row(tile / TileColumns(args.screen)),
        listed(Listed(args, b)),
        order(At(args.lists.order, args.batch, b)),
        owners(At(args.lists.owners, args.batch, b)),
        slots(At(args.lists.slots, args.batch, b)),
        reach(AtOrNull(args.reach, args.batch, b)) {
    const int32_t* ends = At(args.lists.ends, args.batch, b);
    begin = listed && tile > 0 ? ends[tile - 1] : 0;
    count = listed ? ends[tile] - begin : static_cast<int32_t>(args.P);
  }

  // The k-th; −1 where there is none.
  __device__ __forceinline__ Member operator[](int64_t k) const {
    if (k < 0 || k >= count) return {-1, 0};
    const int32_t at = listed ? slots[begin + k] : order[k];
    return {listed ? owners[at] : at, at};
  }
};

// A thread's pixel.
template <class T>
struct Pixel {
  int x, y;
  bool inside;
  int64_t number;

  __device__ Pixel(const Screen& screen, int column, int row) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    x = column * kTile + warp % 2 * kWarpColumns + lane % kWarpColumns;
    y = row * kTile + warp / 2 * kWarpRows + lane / kWarpColumns;
    inside = x < screen.width && y < screen.height;
    number = int64_t{y} * screen.width + x;
  }
};

// A Gaussian in shared memory, with the channels that a walk takes.
template <class N, int kC>
struct alignas(16) Staged {
  Flat<N> flat;
  N channel[kC];
  int32_t owner, row;
};

// Some of them, and one that covers nothing.
template <class N, int kEntries, int kC>
struct Stage {
  Staged<N, kC> entries[kEntries + 1];
  uint8_t warps[kEntries];  // a bit for each warp in whose pixels it may count
};

// As entry i, with channels from `first` on; if more than four are taken, they come after it.
template <class T, class N, int kEntries, int kC>
__device__ __forceinline__ void StageEntry(const Splat<T>& args, int64_t b, const Walk<T>& walk, Member member,
                                           int first, int i, Stage<N, kEntries, kC>& stage) {
  stage.warps[i] = 0;
  if (member.owner < 0) return;
  const Row<N, T> means(args.means, args.batch, b), conics(args.conics, args.batch, b);
  const Row<N, T> opacities(args.opacities, args.batch, b), channels(args.channels, args.batch, b);
  const int64_t at = member.owner;
  const Flat<N> flat = {
      means[2 * at], means[2 * at + 1], Scale(0.5, conics[3 * at]), conics[3 * at + 1], Scale(0.5, conics[3 * at + 2]),
      opacities[at]};
  N few[4] = {};
  if constexpr (kC <= 4) {
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      if (first + c < args.channel_count) few[c] = channels[at * args.channel_count + first + c];
    }
  }
  const T mean[2] = {ValueOf(flat.x), ValueOf(flat.y)};
  const T conic[3] = {2 * ValueOf(flat.half_a), ValueOf(flat.b), 2 * ValueOf(flat.half_c)};
  const Footprint<T> f = FootprintOf(args.screen, mean, conic, ValueOf(flat.opacity),
                                     walk.reach == nullptr || walk.listed ? nullptr : walk.reach + 4 * at);
  if (!walk.listed) {
    if (walk.row < f.y0 || walk.row >= f.y1) return;
    const Columns columns = ColumnsOf(f, args.screen, walk.row);
    if (walk.column < columns.from || walk.column >= columns.to) return;
  }
  uint32_t warps = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; warp += kTile / kWarpColumns) {
    const int left = walk.column * kTile, top = walk.row * kTile + warp / (kTile / kWarpColumns) * kWarpRows;
    const Span<T> span = SpanOf(f, BackTo(f.y, top, top + kWarpRows));
#pragma unroll
    for (int half = 0; half < kTile / kWarpColumns; ++half) {
      const Span<T> pixels = BackTo(f.x, left + half * kWarpColumns, left + (half + 1) * kWarpColumns);
      if (span.low <= span.high && pixels.low <= span.high && pixels.high >= span.low) warps |= 1u << (warp + half);
    }
  }
  Staged<N, kC>& entry = stage.entries[i];
  entry.flat = flat, entry.owner = member.owner, entry.row = member.row;
  if constexpr (kC <= 4) {
#pragma unroll
    for (int c = 0; c < kC; ++c) entry.channel[c] = few[c];
  }
  stage.warps[i] = static_cast<uint8_t>(warps);
}

// Many channels of staged entries, from `first` on: neighbouring threads read neighbouring ones, and write them to the
// entries when nobody goes through these.
template <class N, int kEntries, int kC>
class Fetched {
 public:
  template <class T>
  __device__ __forceinline__ Fetched(const Splat<T>& args, int64_t b, int first, const Stage<N, kEntries, kC>& stage,
                                     bool staged = true)
      : width_(min(kC, args.channel_count - first)), inverse_(((1 << kShift) - 1 + width_) / width_) {
    const Row<N, T> channels(args.channels, args.batch, b);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const Place at = PlaceOf(j);
      const bool there = staged && at.entry < kEntries && stage.warps[at.entry] != 0;
      x_[j] = there ? channels[int64_t{stage.entries[at.entry].owner} * args.channel_count + first + at.channel] : N{};
    }
  }

  __device__ __forceinline__ void Put(Stage<N, kEntries, kC>& stage) const {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const Place at = PlaceOf(j);
      if (at.entry < kEntries) stage.entries[at.entry].channel[at.channel] = x_[j];
    }
  }

  // 0 for those behind the last, which no one puts there.
  static __device__ __forceinline__ void Clear(Stage<N, kEntries, kC>& stage) {
    for (int k = threadIdx.x; k < (kEntries + 1) * kC; k += kThreads) stage.entries[k / kC].channel[k % kC] = N{};
  }

 private:
  static constexpr int kEach = (kEntries * kC + kThreads - 1) / kThreads, kShift = 18;
  static_assert(kEach * kThreads * kC < 1 << kShift, "so that quotients are exact");

  struct Place {
    int entry, channel;
  };
  __device__ __forceinline__ Place PlaceOf(int j) const {
    const int k = threadIdx.x + j * kThreads, entry = static_cast<int>(static_cast<uint32_t>(k) * inverse_ >> kShift);
    return {entry, k - entry * width_};
  }

  int width_;
  uint32_t inverse_;
  N x_[kEach];
};

// Of the entries from 0 up to `end`, or from there down, those that this warp goes through, in that order, and after
// them kPad that cover nothing. `touched` gets a bit for each.
template <bool kDown, int kPad, class S>
__device__ __forceinline__ int ListOfWarp(const S& stage, int end, int32_t* list, unsigned* touched = nullptr) {
  constexpr int kEntries = sizeof(stage.warps), kWords = (kEntries + kWarp - 1) / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int count = 0;
#pragma unroll
  for (int n = 0; n < kWords; ++n) {
    const int word = kDown ? kWords - 1 - n : n, i = word * kWarp + lane;
    const bool mine = i < min(kEntries, end) && (stage.warps[i] >> warp & 1) != 0;
    const unsigned all = __ballot_sync(kFullMask, mine), before = kDown ? all >> lane >> 1 : all & ((1u << lane) - 1);
    if (mine) list[count + __popc(before)] = i;
    if (touched != nullptr && lane == 0) touched[word] = all;
    count += __popc(all);
  }
  if (lane < kPad) list[count + lane] = kEntries;
  __syncwarp();
  return count;
}

// What a Gaussian covers of a pixel.
template <class N>
struct Cover {
  N raw, alpha;
  bool counts, saturates;
};

__device__ __forceinline__ float FastExp(float x) { return __expf(x); }
__device__ __forceinline__ double FastExp(double x) { return ::exp(x); }
template <class T>
__device__ __forceinline__ Dual<T> FastExp(Dual<T> x) {
  const T e = FastExp(x.value);
  return {e, e * x.tangent};
}

__device__ __forceinline__ float Reciprocal(float x) { return __fdividef(1, x); }
__device__ __forceinline__ double Reciprocal(double x) { return 1 / x; }
template <class T>
__device__ __forceinline__ Dual<T> Reciprocal(Dual<T> x) {
  const T r = Reciprocal(x.value);
  return {r, -r * r * x.tangent};
}

template <class N, class T>
__device__ __forceinline__ Cover<N> CoverOf(const Flat<N>& g, T x, T y) {
  const N dx = g.x - Constant<N>(x), dy = g.y - Constant<N>(y);
  const N q = Exponent(g, dx, g.b * dy, g.half_c * dy * dy);
  Cover<N> c;
  c.raw = g.opacity * FastExp(q);
  c.counts = ValueOf(q) <= 0 && ValueOf(c.raw) >= static_cast<T>(kLeastAlpha);
  c.saturates = !(ValueOf(c.raw) < static_cast<T>(kMostAlpha));
  c.alpha = c.saturates ? Constant<N>(static_cast<T>(kMostAlpha)) : c.raw;
  return c;
}

// Of more than four channels, so many are taken at a time; on GPUs with shared memory for it, more.
template <class N>
constexpr int kMany = 64 / sizeof(N);
constexpr int kMost = 36;

// Entries that are gone through without a branch between them.
template <class N, int kC>
constexpr int kTogether = sizeof(N) > 4 ? 1 : (kC > 4 ? 2 : 4);

// Blocks that a multiprocessor should have room for.
template <class N, int kC>
constexpr int kForwardBlocks = sizeof(N) > 4 ? 1 : (kC > 4 ? 2 : 4);
template <class N, int kC>
constexpr int kBackwardBlocks = sizeof(N) > 4 ? (kC > 4 || sizeof(N) > 8 ? 1 : 2) : (kC > 4 ? 2 : 3);

// kC channels at a time. Where a pixel has ended, no transmittance is enough.
template <class T, class N, int kC>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<N, kC>) Forward(const __grid_constant__ Splat<T> args) {
  constexpr int kEntries = sizeof(N) > 8 || kC > 4 ? 128 : 256, kAtOnce = kTogether<N, kC>;
  constexpr bool kDual = !std::is_same_v<N, T>;
  using Channels = Fetched<N, kEntries, kC>;
  __shared__ Stage<N, kEntries, kC> stage;
  alignas(16) __shared__ int32_t lists[kWarps][kEntries + 4];
  const int tiles = TileCount(args.screen), C = args.channel_count;
  const int64_t b = blockIdx.x / tiles, pixels = int64_t{args.screen.width} * args.screen.height;
  const Walk<T> walk(args, b, static_cast<int>(blockIdx.x - b * tiles));
  const Pixel<T> pixel(args.screen, walk.column, walk.row);
  const T x = static_cast<T>(pixel.x) + T(0.5), y = static_cast<T>(pixel.y) + T(0.5);
  const T never = static_cast<T>(INFINITY);
  const Row<N, T> background(args.background, args.batch, b);
  __shared__ N behind[kC];  // the background
  int32_t* list = lists[threadIdx.x / kWarp];
  if (threadIdx.x == 0) stage.entries[kEntries] = {};
#pragma unroll 1
  for (int first = 0; first < C; first += kC) {
    if constexpr (kC > 4) Channels::Clear(stage);
    if (threadIdx.x < kC) behind[threadIdx.x] = first + threadIdx.x < C ? background[first + threadIdx.x] : N{};
    __syncthreads();
    N image[kC] = {}, through = Constant<N>(T(1));
    int32_t last = 0;
    T enough = pixel.inside ? static_cast<T>(kLeastThrough) : never;
    Member next = walk[threadIdx.x];
    for (int32_t base = 0; base < walk.count; base += kEntries) {
      if (__syncthreads_count(enough < never) == 0) break;
      if (threadIdx.x < kEntries) {
        StageEntry(args, b, walk, next, first, threadIdx.x, stage);
        next = walk[int64_t{base} + kEntries + threadIdx.x];
      }
      __syncthreads();
      if constexpr (kC > 4) {
        Channels(args, b, first, stage).Put(stage);
        __syncthreads();
      }
      const int count = ListOfWarp<false, kAtOnce - 1>(stage, kEntries, list);
#pragma unroll 1
      for (int k = 0; k < count; k += kAtOnce) {
        if (!__any_sync(kFullMask, enough < never)) break;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int i = list[k + j];
          const Staged<N, kC>& entry = stage.entries[i];
          const Cover<N> cover = CoverOf(entry.flat, x, y);
          const N weight = cover.alpha * through, after = through * (Constant<N>(T(1)) - cover.alpha);
          const bool open = ValueOf(after) >= enough;
          if (cover.counts && open) {
#pragma unroll
            for (int c = 0; c < kC; ++c) image[c] = Fma(weight, entry.channel[c], image[c]);
            through = after;
            last = base + i + 1;
          }
          if (cover.counts && !open) enough = never;
        }
      }
    }
    if (pixel.inside) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        if (first + c >= C) break;
        args.image[(b * pixels + pixel.number) * C + first + c] = Result(Fma(through, behind[c], image[c]));
      }
      if (first == 0) {
        args.alpha[b * pixels + pixel.number] = kDual ? -Result(through) : 1 - Result(through);
        T* left = args.through_out + b * pixels * (kDual ? 2 : 1) + pixel.number;
        left[0] = ValueOf(through);
        if constexpr (kDual) left[pixels] = through.tangent;
        args.last_out[b * pixels + pixel.number] = last;
      }
    }
    __syncthreads();  // before others are staged
  }
}

__device__ __forceinline__ int WarpMax(int x) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

// What backward leaves: of a pair, in its slot; or, without lists, of a Gaussian: first the largest terms, then sums.
// That are sums over pixels (moments, and behind them their tangents), and gradients in channels if they are wanted.
template <class T>
struct Left {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, unsigned long long>;
  int width;
  T* slots;                  // [capacity, width]
  unsigned long long* sums;  // [P, width], in the same place
  Bits* largest;             // [P, width], behind them
  T* of_background;          // [tiles, C], behind all
};

__device__ __forceinline__ uint32_t Magnitude(float x) { return FloatToBits(x) & 0x7fffffffu; }
__device__ __forceinline__ unsigned long long Magnitude(double x) {
  return static_cast<unsigned long long>(__double_as_longlong(x)) & 0x7fffffffffffffffull;
}
__device__ __forceinline__ double FromMagnitude(uint32_t bits) { return BitsToFloat(bits); }
__device__ __forceinline__ double FromMagnitude(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}
// By which power of two terms up to `largest` are multiplied, so that the sum of 2^log_terms of them has 62 bits.
__device__ __forceinline__ int Shift(double largest, int log_terms) { return 61 - log_terms - ilogb(largest); }

// Without lists, all kernels that add run twice: pass 0 finds the largest terms, pass 1 adds.
template <class T, class N, int kC>
struct Back {
  static constexpr bool kDual = !std::is_same_v<N, T>, kFew = kC <= 4;
  static constexpr int kOfMoments = kDual ? 2 * kMoments : kMoments, kWidth = kOfMoments + kC;
  // Entries that are staged at a time, and those of them that a warp sums at a time. The sums of a warp's pixels are in
  // one of two buffers, while those of the entries before are summed over warps. Shared memory of any GPU has room.
  static constexpr int kOfMany = kC > kMany<N> ? 20 : (sizeof(T) == 4 ? 24 : 16);
  static constexpr int kEntries = kFew ? (sizeof(N) == 4 ? 48 : (sizeof(N) == 8 ? 24 : 8)) : kOfMany;
  static constexpr int kGroup = sizeof(N) == 4 ? 8 : sizeof(N) == 8 ? 4 : 2;
  static constexpr int kBuffers = kFew ? 2 : 1, kAhead = kFew ? 1 : 2;
  static constexpr int kSome = kC % 12 == 0 ? 12 : kC % 8 == 0 ? 8 : kC;  // channels that a lane sums at a time
  static constexpr int kWords = (kEntries + kWarp - 1) / kWarp;

  // What a warp has: its pixels' cotangents; and of entries that it has been through, q̄ and weight at each pixel.
  struct OfWarp {
    struct {
      alignas(16) N ct[kGroup][kC];
      alignas(16) N gap;
    } part[kWarp / kGroup];                                 // whose rows are in banks of their own
    N q_bar[kGroup][kWarp + 1], weight[kGroup][kWarp + 1];  // likewise
    alignas(16) int32_t list[kEntries + 4];
    T sums[kBuffers][kEntries][kWidth];
    unsigned touched[kBuffers][kWords];
    T of_background[kC];
    int32_t last;
  };
  struct Shared {
    Stage<N, kEntries, kC> stage[3];
    OfWarp warp[kWarps];
  };
  static_assert(sizeof(Shared) <= (kC > kMany<N> ? 101376 : 65536), "Turing has no more; all later ones have 99 KB");

  // Sums over the warp's pixels, of n entries. A lane has an entry and a part of the pixels.
  static __device__ __forceinline__ void SumPixels(const Stage<N, kEntries, kC>& stage, OfWarp& mine,
                                                   const int32_t* list, int n, int buffer, T left, T top) {
    const int lane = threadIdx.x % kWarp, e = lane % kGroup, first = lane / kGroup * kGroup;
    __syncwarp();
    const bool there = e < n;
    const int i = there ? list[e] : kEntries;
    const N gx = stage.entries[i].flat.x, gy = stage.entries[i].flat.y;
    const N dy = gy - Constant<N>(top + static_cast<T>(first / kWarpColumns) + T(0.5));
    const auto over_parts = [&](int k, T sum) {
#pragma unroll
      for (int step = kGroup; step < kWarp; step *= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
      if (there && first == 0) mine.sums[buffer][i][k] = sum;
    };
    N moments[kMoments] = {};
#pragma unroll
    for (int s = 0; s < kGroup; ++s) {
      const int p = first + s;
      const N q_bar = mine.q_bar[e][p];
      const N dx = gx - Constant<N>(left + static_cast<T>(p % kWarpColumns) + T(0.5));
      const N q_dx = q_bar * dx, q_dy = q_bar * dy;
      moments[0] = moments[0] + q_bar;
      moments[1] = moments[1] + q_dx;
      moments[2] = moments[2] + q_dy;
      moments[3] = Fma(q_dx, dx, moments[3]);
      moments[4] = Fma(q_dx, dy, moments[4]);
      moments[5] = Fma(q_dy, dy, moments[5]);
    }
#pragma unroll
    for (int m = 0; m < kMoments; ++m) {
      over_parts(m, ValueOf(moments[m]));
      if constexpr (kDual) over_parts(kMoments + m, moments[m].tangent);
    }
#pragma unroll 1
    for (int c0 = 0; c0 < kC; c0 += kSome) {
      T channels[kSome] = {};
#pragma unroll
      for (int s = 0; s < kGroup; ++s) {
        const N weight = mine.weight[e][first + s];
#pragma unroll
        for (int c = 0; c < kSome; ++c) {
          const N g = mine.part[first / kGroup].ct[s][c0 + c];
          if constexpr (kDual) {
            channels[c] = Fma(weight.value, g.tangent, Fma(weight.tangent, g.value, channels[c]));
          } else {
            channels[c] = Fma(weight, g, channels[c]);
          }
        }
      }
#pragma unroll
      for (int c = 0; c < kSome; ++c) over_parts(kOfMoments + c0 + c, channels[c]);
    }
    __syncwarp();
  }

  // Sums over warps, in their order, of entries of which the first is the base-th of the tile.
  static __device__ void Leave(const Splat<T>& args, const Walk<T>& walk, const Left<T>& to, const Shared& shared,
                               const Stage<N, kEntries, kC>& stage, int buffer, int32_t base, int first, int pass,
                               int log_terms) {
    for (int j = threadIdx.x; j < kEntries * kWidth; j += kThreads) {
      const int i = j / kWidth, n = j % kWidth, column = n < kOfMoments ? n : n + first;
      if (base + i < 0 || column >= to.width) continue;
      T sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const OfWarp& warp = shared.warp[w];
        if (warp.touched[buffer][i / kWarp] >> i % kWarp & 1) sum += warp.sums[buffer][i][n];
      }
      const int64_t at = stage.entries[i].row * int64_t{to.width} + column;
      if (walk.listed) {
        to.slots[at] = n < kOfMoments && first > 0 ? to.slots[at] + sum : sum;
      } else if (sum == 0) {
        continue;
      } else if (pass == 0) {
        atomicMax(to.largest + at, Magnitude(sum));
      } else if (const double largest = FromMagnitude(to.largest[at]); largest - largest == 0) {
        const double whole = ldexp(static_cast<double>(sum), Shift(largest, log_terms));
        atomicAdd(to.sums + at, static_cast<unsigned long long>(__double2ll_rn(whole)));
      }
    }
  }
};

template <class T, class N, int kC>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<N, kC>)
    Backward(const __grid_constant__ Splat<T> args, int64_t b, const __grid_constant__ Left<T> left_over, int pass,
             int log_terms) {
  using B = Back<T, N, kC>;
  using Channels = Fetched<N, B::kEntries, kC>;
  constexpr bool kDual = B::kDual;
  constexpr int kEntries = B::kEntries, kAtOnce = kTogether<N, kC>;
  extern __shared__ double2 memory[];
  if (pass > 0 && Listed(args, b)) return;
  auto& shared = *reinterpret_cast<typename B::Shared*>(memory);
  const int C = args.channel_count, lane = threadIdx.x % kWarp;
  auto& mine = shared.warp[threadIdx.x / kWarp];
  const Walk<T> walk(args, b, static_cast<int>(blockIdx.x));
  const int64_t pixels = int64_t{args.screen.width} * args.screen.height;
  const Pixel<T> pixel(args.screen, walk.column, walk.row);
  const T x = static_cast<T>(pixel.x) + T(0.5), y = static_cast<T>(pixel.y) + T(0.5);
  // Where the warp's pixels begin.
  const T left = static_cast<T>(pixel.x - lane % kWarpColumns), top = static_cast<T>(pixel.y - lane / kWarpColumns);
  const Row<N, T> background(args.background, args.batch, b);
  const Cotangent<N, T> image_ct(args.image_ct, args.batch, b), alpha_ct(args.alpha_ct, args.batch, b);

  N end = {};  // transmittance at the end
  int32_t last = 0;
  if (pixel.inside) {
    const T* through = At(args.through, args.batch, b) + pixel.number;
    if constexpr (kDual) {
      end = {through[0], through[pixels]};
    } else {
      end = through[0];
    }
    last = At(args.last, args.batch, b)[pixel.number];
  }
  const int32_t warp_last = WarpMax(last);
  if (lane == 0) mine.last = warp_last;
  if (threadIdx.x < 3) shared.stage[threadIdx.x].entries[kEntries] = {};
  __syncthreads();
  int32_t block_last = 0;
  for (int w = 0; w < kWarps; ++w) block_last = max(block_last, shared.warp[w].last);

  if (walk.listed) {  // nothing is left of pairs behind
    for (int64_t i = threadIdx.x; i < int64_t{walk.count - block_last} * left_over.width; i += kThreads) {
      const int64_t slot = walk.slots[walk.begin + block_last + i / left_over.width];
      left_over.slots[slot * left_over.width + i % left_over.width] = 0;
    }
  }

  // The n-th entries from behind begin at the base-th of the tile, which may be negative: then the first are none. Who
  // stages entries is another with each n, and finds out long before which Gaussians they are.
  const int batches = (block_last + kEntries - 1) / kEntries;
  const auto base = [&](int n) { return block_last - (n + 1) * kEntries; };
  const auto turn = [&](int n) { return static_cast<int>((threadIdx.x + n * 2u * kWarp) % kThreads); };

#pragma unroll 1
  for (int first = 0; first < C; first += kC) {
    N ct[kC], behind = {}, through = end;
    if (pixel.inside && first == 0 && alpha_ct.given()) behind = -alpha_ct[pixel.number];
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      ct[c] = pixel.inside && image_ct.given() && first + c < C ? image_ct[pixel.number * C + first + c] : N{};
    }
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      if (image_ct.given() && first + c < C) behind = Fma(background[first + c], ct[c], behind);
      mine.part[lane / B::kGroup].ct[lane % B::kGroup][c] = ct[c];
    }
    behind = behind * end;
    for (int c = 0; args.background_bar != nullptr && c < kC; ++c) {
      const T sum = WarpSum(Result(end * mine.part[lane / B::kGroup].ct[lane % B::kGroup][c]));
      if (lane == 0) mine.of_background[c] = sum;
    }
    Member next = {-1, 0};
    const auto find = [&](int n) {
      if (n < batches && turn(n) < kEntries) next = walk[base(n) + turn(n)];
    };
    const auto stage_entries = [&](int n) {
      if (n < batches && turn(n) < kEntries) StageEntry(args, b, walk, next, first, turn(n), shared.stage[n % 3]);
    };
#pragma unroll
    for (int n = 0; n < B::kAhead; ++n) {
      if constexpr (kC > 4) Channels::Clear(shared.stage[n]);
      find(n);
      stage_entries(n);
    }
    if constexpr (kC > 4) Channels::Clear(shared.stage[2]);
    find(B::kAhead);
    __syncthreads();
    if constexpr (kC > 4) {
      if (batches > 0) Channels(args, b, first, shared.stage[0]).Put(shared.stage[0]);
      __syncthreads();
    }
    if (args.background_bar != nullptr && pass == 0 && threadIdx.x < kC && first + static_cast<int>(threadIdx.x) < C) {
      T sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared.warp[w].of_background[threadIdx.x];
      left_over.of_background[int64_t{blockIdx.x} * C + first + threadIdx.x] = sum;
    }

#pragma unroll 1
    for (int n = 0; n < batches; ++n) {
      const auto& stage = shared.stage[n % 3];
      const int buffer = n % B::kBuffers;
      if (B::kBuffers > 1 && n > 0) {
        B::Leave(args, walk, left_over, shared, shared.stage[(n - 1) % 3], buffer ^ 1, base(n - 1), first, pass,
                 log_terms);
      }
      stage_entries(n + B::kAhead);
      find(n + B::kAhead + 1);
      // Channels come when entries are there, and where they may not be put yet.
      const auto fetched = [&] {
        if constexpr (kC > 4) {
          return Channels(args, b, first, shared.stage[(n + 1) % 3], n + 1 < batches);
        } else {
          return 0;
        }
      }();

      const int count = ListOfWarp<true, kAtOnce - 1>(stage, warp_last - base(n), mine.list, mine.touched[buffer]);
#pragma unroll 1
      for (int group = 0; group < count; group += B::kGroup) {
        const int here = min(B::kGroup, count - group);
#pragma unroll 1
        for (int k = 0; k < here; k += kAtOnce) {
          N q_bars[kAtOnce], weights[kAtOnce];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            const int i = mine.list[group + k + j];
            const Staged<N, kC>& entry = stage.entries[i];
            const Cover<N> cover = CoverOf(entry.flat, x, y);
            const bool counts = cover.counts && base(n) + i < last;
            const N rest = Reciprocal(Constant<N>(T(1)) - cover.alpha), before = through * rest;
            const N weight = cover.alpha * before;
            N u = {};
#pragma unroll
            for (int c = 0; c < kC; ++c) u = Fma(entry.channel[c], ct[c], u);
            const N q_bar = cover.raw * (rest * (through * u - behind));
            q_bars[j] = counts && !cover.saturates ? q_bar : N{};
            weights[j] = counts ? weight : N{};
            if (counts) {
              behind = Fma(weight, u, behind);
              through = before;
            }
          }
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) mine.q_bar[k + j][lane] = q_bars[j], mine.weight[k + j][lane] = weights[j];
        }
        B::SumPixels(stage, mine, mine.list + group, here, buffer, left, top);
      }
      if constexpr (kC > 4) {
        if (n + 1 < batches) fetched.Put(shared.stage[(n + 1) % 3]);
      }
      __syncthreads();
      if (B::kBuffers == 1 || n + 1 == batches) {
        B::Leave(args, walk, left_over, shared, stage, buffer, base(n), first, pass, log_terms);
        __syncthreads();
      }
    }
  }
}

template <class T>
__global__ void ClearSums(const __grid_constant__ Splat<T> args, int64_t b, const __grid_constant__ Left<T> left_over) {
  if (Listed(args, b)) return;
  const int64_t size = args.P * left_over.width, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += step) {
    left_over.sums[i] = 0, left_over.largest[i] = 0;
  }
}

// Sums of `count` columns, from `first` on, over the rows [begin, end) of each lane's Gaussian. Of one with many rows,
// the lanes of the warp take some each.
inline constexpr int kColumns = 16;
template <class T>
__device__ __forceinline__ void SumRows(const T* slots, int width, int first, int count, int32_t begin, int32_t end,
                                        T (&sum)[kColumns]) {
  constexpr int kFew = 24;
  const int lane = threadIdx.x % kWarp;
  const auto add = [&](int64_t row, T(&to)[kColumns]) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) to[n] += n < count ? slots[row * width + first + n] : T(0);
  };
  const bool few = end - begin <= kFew;
#pragma unroll 2
  for (int32_t row = begin; few && row < end; ++row) add(row, sum);
  for (unsigned many = __ballot_sync(kFullMask, !few); many != 0; many &= many - 1) {
    const int of = __ffs(many) - 1;
    const int32_t to = __shfl_sync(kFullMask, end, of);
    T some[kColumns] = {};
#pragma unroll 2
    for (int32_t row = __shfl_sync(kFullMask, begin, of) + lane; row < to; row += kWarp) add(row, some);
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const T all = WarpSum(some[n]);
      if (lane == of) sum[n] = all;
    }
  }
}

// What all tiles leave of a Gaussian.
template <class T, class N>
__global__ void __launch_bounds__(kThreads) SumPairs(const __grid_constant__ Splat<T> args, int64_t b,
                                                     const __grid_constant__ Left<T> left_over, int log_terms) {
  constexpr int kOfMoments = std::is_same_v<N, T> ? kMoments : 2 * kMoments;
  const int64_t g = int64_t{blockIdx.x} * kThreads + threadIdx.x, at_g = b * args.P + g;
  const bool there = g < args.P, listed = Listed(args, b);
  const int width = left_over.width, C = args.channel_count;
  const int32_t* offsets = At(args.lists.offsets, args.batch, b);
  const int32_t begin = listed ? offsets[min(g, args.P)] : 0, end = listed ? offsets[min(g + 1, args.P)] : 0;
#pragma unroll 1
  for (int first = 0; first < width; first += kColumns) {
    const int count = min(kColumns, width - first);
    T sum[kColumns] = {};
    if (listed) {
      SumRows(left_over.slots, width, first, count, begin, end, sum);
    } else if (there) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        if (n >= count) break;
        const double largest = FromMagnitude(left_over.largest[g * width + first + n]);
        const double whole = static_cast<double>(static_cast<long long>(left_over.sums[g * width + first + n]));
        const bool finite = largest - largest == 0;
        sum[n] = static_cast<T>(!finite        ? largest - largest
                                : largest == 0 ? 0.0
                                               : ldexp(whole, -Shift(largest, log_terms)));
      }
    }
    if (!there) continue;
    if (first == 0) {
      N moments[kMoments], bar[kMoments] = {};
      bool any = false;  // else it may be a Gaussian that is nowhere
#pragma unroll
      for (int m = 0; m < kMoments; ++m) {
        any |= sum[m] != 0;
        if constexpr (std::is_same_v<N, T>) {
          moments[m] = sum[m];
        } else {
          any |= sum[kMoments + m] != 0;
          moments[m] = {sum[m], sum[kMoments + m]};
        }
      }
      if (any) {
        const Row<N, T> means(args.means, args.batch, b), conics(args.conics, args.batch, b);
        const Row<N, T> opacities(args.opacities, args.batch, b);
        const Flat<N> flat = {
            means[2 * g], means[2 * g + 1], Scale(0.5, conics[3 * g]), conics[3 * g + 1], Scale(0.5, conics[3 * g + 2]),
            opacities[g]};
        FromMoments(flat, moments, bar);
      }
      if (T* to = args.means_bar; to != nullptr) to[at_g * 2] = Result(bar[0]), to[at_g * 2 + 1] = Result(bar[1]);
      if (T* to = args.conics_bar; to != nullptr) {
#pragma unroll
        for (int n = 0; n < 3; ++n) to[at_g * 3 + n] = Result(bar[2 + n]);
      }
      if (args.opacities_bar != nullptr) args.opacities_bar[at_g] = Result(bar[5]);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const int c = first + n - kOfMoments;
      if (n < count && c >= 0) args.channels_bar[at_g * C + c] = sum[n];
    }
  }
}

// The background's gradient from what tiles leave: a block has a channel.
template <class T>
__global__ void __launch_bounds__(kThreads)
    SumTiles(const __grid_constant__ Splat<T> args, int64_t b, const T* of_tiles) {
  __shared__ T sums[kThreads];
  const int tiles = TileCount(args.screen), C = args.channel_count;
  T sum = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += kThreads) sum += of_tiles[int64_t{tile} * C + blockIdx.x];
  sums[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) args.background_bar[b * C + blockIdx.x] = sums[0];
}

template <class T, class N, int kC>
cudaError_t LaunchBackward(const Splat<T>& args, char* scratch, int64_t bytes, cudaStream_t stream) {
  const int tiles = TileCount(args.screen), C = args.channel_count;
  const int width = Back<T, N, kC>::kOfMoments + (args.channels_bar != nullptr ? C : 0);
  const int64_t terms = args.P * width, item = sizeof(T);
  const int64_t of_pairs = CeilDiv(Max(args.capacity * width * item, terms * (8 + item)), 256) * 256;
  if (of_pairs + int64_t{tiles} * C * item > bytes) return cudaErrorMemoryAllocation;  // see _scratch in Python
  Left<T> left_over = {};
  left_over.width = width;
  left_over.slots = reinterpret_cast<T*>(scratch);
  left_over.sums = reinterpret_cast<unsigned long long*>(scratch);
  left_over.largest = reinterpret_cast<typename Left<T>::Bits*>(scratch + terms * 8);
  left_over.of_background = reinterpret_cast<T*>(scratch + of_pairs);
  constexpr size_t shared = sizeof(typename Back<T, N, kC>::Shared);
  if (cudaError_t error = AllowSharedMemory(Backward<T, N, kC>, shared); error != cudaSuccess) return error;
  int log_terms = 0;
  while (int64_t{1} << log_terms < int64_t{tiles} * CeilDiv(C, kC)) ++log_terms;
  for (int64_t b = 0; b < Count(args.batch); ++b) {
    ClearSums<<<static_cast<unsigned>(Max(1, Min(CeilDiv(terms, kThreads), 1024))), kThreads, 0, stream>>>(args, b,
                                                                                                           left_over);
    for (int pass = 0; pass < 2; ++pass) {
      Backward<T, N, kC><<<tiles, kThreads, shared, stream>>>(args, b, left_over, pass, log_terms);
    }
    if (args.P > 0) SumPairs<T, N><<<Blocks(args.P), kThreads, 0, stream>>>(args, b, left_over, log_terms);
    if (args.background_bar != nullptr) SumTiles<<<C, kThreads, 0, stream>>>(args, b, left_over.of_background);
    if (cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class T, class N, int kC>
cudaError_t LaunchForward(const Splat<T>& args, cudaStream_t stream) {
  const int64_t blocks = Count(args.batch) * TileCount(args.screen);
  if (cudaError_t error = CheckGrid(blocks); error != cudaSuccess) return error;
  Forward<T, N, kC><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

template <class T>
cudaError_t LaunchTiles(const Tiles<T>& args, void* scratch, int64_t bytes, cudaStream_t stream) {
  using namespace KNN_ISA;
  if (cudaError_t error = CheckGrid(Max(args.P, args.capacity)); error != cudaSuccess) return error;
  for (int64_t b = 0; b < Count(args.batch); ++b) {
    cudaError_t error = ListEntry(Entry<T>(args, b), static_cast<char*>(scratch), bytes, stream);
    if (error == cudaSuccess) error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
template cudaError_t LaunchTiles(const Tiles<float>&, void*, int64_t, cudaStream_t);
template cudaError_t LaunchTiles(const Tiles<double>&, void*, int64_t, cudaStream_t);

template <class T>
cudaError_t LaunchSplatForward(const Splat<T>& args, cudaStream_t stream) {
  using namespace KNN_ISA;
  if (Count(args.batch) == 0) return cudaSuccess;
  const bool few = args.channel_count <= 4;
  if (args.dual) {
    return few ? LaunchForward<T, Dual<T>, 4>(args, stream) : LaunchForward<T, Dual<T>, kMany<Dual<T>>>(args, stream);
  }
  if constexpr (sizeof(T) == 4) {
    if (args.channel_count > kMany<T>) return LaunchForward<T, T, kMost>(args, stream);
  }
  return few ? LaunchForward<T, T, 4>(args, stream) : LaunchForward<T, T, kMany<T>>(args, stream);
}
template cudaError_t LaunchSplatForward(const Splat<float>&, cudaStream_t);
template cudaError_t LaunchSplatForward(const Splat<double>&, cudaStream_t);

template <class T>
cudaError_t LaunchSplatBackward(const Splat<T>& args, void* scratch, int64_t bytes, cudaStream_t stream) {
  using namespace KNN_ISA;
  auto* at = static_cast<char*>(scratch);
  const bool few = args.channel_count <= 4;
  if (args.dual) {
    return few ? LaunchBackward<T, Dual<T>, 4>(args, at, bytes, stream)
               : LaunchBackward<T, Dual<T>, kMany<Dual<T>>>(args, at, bytes, stream);
  }
  if constexpr (sizeof(T) == 4) {
    int device, room;
    if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
    cudaError_t error = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    if (args.channel_count > kMany<T> && room >= static_cast<int>(sizeof(typename Back<T, T, kMost>::Shared))) {
      return LaunchBackward<T, T, kMost>(args, at, bytes, stream);
    }
  }
  return few ? LaunchBackward<T, T, 4>(args, at, bytes, stream)
             : LaunchBackward<T, T, kMany<T>>(args, at, bytes, stream);
}
template cudaError_t LaunchSplatBackward(const Splat<float>&, void*, int64_t, cudaStream_t);
template cudaError_t LaunchSplatBackward(const Splat<double>&, void*, int64_t, cudaStream_t);

}  // namespace knn
