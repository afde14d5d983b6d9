// Gaussians by tile, and their blending, on CUDA.
//
// Lists: Gaussians are sorted by depth; each counts its tiles; a running sum says where its pairs begin; it writes
// them; pairs, which are in the order of ranks, are sorted stably by tile. How many there are only the device knows:
// sorts are over all that lists have room for, and where there is too little room nobody writes pairs.
//
// Blending: a block has a tile and a thread a pixel; a warp has 8 x 4 pixels. Gaussians are staged in shared memory
// some at a time, and who stages one finds out which warps it may touch, so that warps go through those alone. Without
// lists the same kernels stage all Gaussians, and most touch no warp.
//
// Gradients: a warp sums over its pixels by exchanges that leave each lane with one of the sums, the block sums over
// its warps, in their order, and writes to the pair's slot; slots of a Gaussian are neighbours and are summed in their
// order. Without lists there are no slots. Then blocks add whole numbers, which come to the same sum in any order:
// multiples of a step that is found from the largest of a Gaussian's terms, in a pass before.

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

// Calls run(tile, n) for the n-th tile of each lane's Gaussian, and returns how many it has. A lane with many is helped
// by its warp.
template <class T, class F>
__device__ int ForEachTile(const Footprint<T>& mine, const Screen& screen, F&& run) {
  constexpr int kFew = 8;
  const int columns = TileColumns(screen), lane = threadIdx.x % kWarp;
  const int box = mine.empty() ? 0 : (mine.x1 - mine.x0) * (mine.y1 - mine.y0);
  int found = 0;
  if (box <= kFew) {
    for (int row = mine.y0; row < mine.y1; ++row) {
      for (int column = mine.x0; column < mine.x1; ++column) {
        if (TouchesTile(mine, screen, column, row)) run(row * columns + column, found++, lane);
      }
    }
  }
  for (unsigned many = __ballot_sync(kFullMask, box > kFew); many != 0; many &= many - 1) {
    const int from = __ffs(many) - 1;
    const auto share = [&](auto x) { return __shfl_sync(kFullMask, x, from); };
    const Footprint<T> f = {share(mine.x),
                            share(mine.y),
                            share(mine.half_a),
                            share(mine.b),
                            share(mine.half_c),
                            share(mine.most),
                            share(static_cast<int>(mine.definite)) != 0,
                            share(mine.x0),
                            share(mine.x1),
                            share(mine.y0),
                            share(mine.y1)};
    const int width = f.x1 - f.x0, size = share(box);
    int count = 0;
    for (int first = 0; first < size; first += kWarp) {
      const int i = first + lane, row = f.y0 + i / width, column = f.x0 + i % width;
      const bool touches = i < size && TouchesTile(f, screen, column, row);
      const unsigned all = __ballot_sync(kFullMask, touches);
      if (touches) run(row * columns + column, count + __popc(all & ((1u << lane) - 1)), from);
      count += __popc(all);
    }
    if (lane == from) found = count;
  }
  return found;
}

template <class T>
__device__ Footprint<T> FootprintOfRank(const Entry<T>& e, int64_t r) {
  if (r >= e.P) return {};
  const int64_t g = e.order[r];
  return FootprintOf(e.screen, e.means + 2 * g, e.conics + 3 * g, e.opacities[g],
                     e.reach == nullptr ? nullptr : e.reach + 4 * g);
}

template <class T>
__global__ void __launch_bounds__(kThreads) CountPairs(const __grid_constant__ Entry<T> e) {
  const int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int count = ForEachTile(FootprintOfRank(e, r), e.screen, [](int, int, int) {});
  if (r < e.P) e.offsets[r + 1] = count;
  if (r == 0) e.offsets[0] = 0;
}

// Of numbers that are not negative; what would be too large is the largest.
struct SaturatingSum {
  __host__ __device__ int32_t operator()(int32_t a, int32_t b) const { return a > INT32_MAX - b ? INT32_MAX : a + b; }
};

template <class Key>
__global__ void EmptyPairs(int64_t capacity, Key none, Key* keys, int32_t* slots) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < capacity) keys[i] = none, slots[i] = static_cast<int32_t>(i);
}

template <class T, class Key>
__global__ void __launch_bounds__(kThreads) WritePairs(const __grid_constant__ Entry<T> e, Key* keys) {
  if (e.offsets[e.P] > e.capacity) return;
  const int64_t r = int64_t{blockIdx.x} * kThreads + threadIdx.x, first = r - threadIdx.x % kWarp;
  ForEachTile(FootprintOfRank(e, r), e.screen, [&](int tile, int n, int lane) {
    const int64_t rank = first + lane, slot = e.offsets[rank] + n;
    keys[slot] = static_cast<Key>(tile);
    e.owners[slot] = e.order[rank];
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
  auto* other_slots = reinterpret_cast<int32_t*>(scratch);
  auto* keys = reinterpret_cast<Key*>(other_slots + e.capacity);
  const int64_t used = CeilDiv(e.capacity * (4 + 2 * static_cast<int64_t>(sizeof(Key))), 256) * 256;
  EmptyPairs<<<Blocks(e.capacity), kThreads, 0, stream>>>(e.capacity, static_cast<Key>(tiles), keys, e.slots);
  WritePairs<<<Blocks(e.P), kThreads, 0, stream>>>(e, keys);
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
  size_t needed = 0;
  error = cub::DeviceScan::InclusiveScan(nullptr, needed, e.offsets + 1, e.offsets + 1, SaturatingSum(), e.P, stream);
  if (error != cudaSuccess) return error;
  if (static_cast<int64_t>(needed) > bytes) return cudaErrorMemoryAllocation;
  error = cub::DeviceScan::InclusiveScan(scratch, needed, e.offsets + 1, e.offsets + 1, SaturatingSum(), e.P, stream);
  if (error != cudaSuccess) return error;
  return TileCount(e.screen) < 65536 ? ListPairs<T, uint16_t>(e, scratch, bytes, stream)
                                     : ListPairs<T, uint32_t>(e, scratch, bytes, stream);
}

// ---- Blending

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
        order(At(args.lists.order, args.batch, b)),
        owners(At(args.lists.owners, args.batch, b)),
        slots(At(args.lists.slots, args.batch, b)),
        reach(AtOrNull(args.reach, args.batch, b)) {
    const int32_t* ends = At(args.lists.ends, args.batch, b);
    listed = At(args.lists.offsets, args.batch, b)[args.P] <= args.capacity;
    begin = listed && tile > 0 ? ends[tile - 1] : 0;
    count = listed ? ends[tile] - begin : static_cast<int32_t>(args.P);
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

// Gaussians in shared memory.
template <class N, int kEntries, int kC>
struct Staged {
  static constexpr int kChannels = kC <= 4 ? kC : 0;  // more are read where they lie
  Flat<N> flat[kEntries];
  N channel[kEntries][kChannels > 0 ? kChannels : 1];
  int32_t owner[kEntries];
  uint8_t warps[kEntries];  // a bit for each that it may touch
};

// The k-th Gaussian of a walk, as entry i; nothing where there is none.
template <class T, class N, int kEntries, int kC>
__device__ __forceinline__ void Stage(const Splat<T>& args, int64_t b, const Walk<T>& walk, int64_t k, int i,
                                      Staged<N, kEntries, kC>& staged) {
  staged.warps[i] = 0;
  if (k < 0 || k >= walk.count) return;
  const int32_t g = walk.listed ? walk.owners[walk.slots[walk.begin + k]] : walk.order[k];
  const Row<N, T> means(args.means, args.batch, b), conics(args.conics, args.batch, b);
  const Row<N, T> opacities(args.opacities, args.batch, b), channels(args.channels, args.batch, b);
  const int64_t at = g;
  const Flat<N> flat = {
      means[2 * at], means[2 * at + 1], Scale(0.5, conics[3 * at]), conics[3 * at + 1], Scale(0.5, conics[3 * at + 2]),
      opacities[at]};
  const T mean[2] = {ValueOf(flat.x), ValueOf(flat.y)};
  const T conic[3] = {2 * ValueOf(flat.half_a), ValueOf(flat.b), 2 * ValueOf(flat.half_c)};
  Footprint<T> f;
  if (walk.listed) {
    f = Unbounded(args.screen, mean, conic, ValueOf(flat.opacity));
  } else {
    f = FootprintOf(args.screen, mean, conic, ValueOf(flat.opacity),
                    walk.reach == nullptr ? nullptr : walk.reach + 4 * at);
    if (walk.column < f.x0 || walk.column >= f.x1 || walk.row < f.y0 || walk.row >= f.y1) return;
    if (!TouchesTile(f, args.screen, walk.column, walk.row)) return;
  }
  uint32_t warps = 0;
#pragma unroll 1
  for (int warp = 0; warp < kWarps; ++warp) {
    const int left = walk.column * kTile + warp % 2 * kWarpColumns, top = walk.row * kTile + warp / 2 * kWarpRows;
    const int right = min(left + kWarpColumns, args.screen.width), bottom = min(top + kWarpRows, args.screen.height);
    if (left < right && top < bottom && Touches(f, left, right, top, bottom)) warps |= 1u << warp;
  }
  staged.flat[i] = flat;
  staged.owner[i] = g;
  staged.warps[i] = static_cast<uint8_t>(warps);
  if constexpr (kC <= 4) {
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      staged.channel[i][c] = c < args.channel_count ? channels[at * args.channel_count + c] : N{};
    }
  }
}

// Which of the 32 entries from `first` on this warp goes through.
template <class S>
__device__ __forceinline__ unsigned EntriesOfWarp(const S& staged, int first) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  return __ballot_sync(kFullMask, staged.warps[first + lane] >> warp & 1);
}

// What a Gaussian covers of a pixel.
template <class N>
struct Cover {
  N raw, alpha;
  bool saturates;
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
__device__ __forceinline__ bool Covers(const Flat<N>& g, T x, T y, Cover<N>& c) {
  const N dx = g.x - Constant<N>(x), dy = g.y - Constant<N>(y);
  const N q = Exponent(g, dx, g.b * dy, g.half_c * dy * dy);
  if (!(ValueOf(q) <= 0)) return false;
  c.raw = g.opacity * FastExp(q);
  if (!(ValueOf(c.raw) >= static_cast<T>(kLeastAlpha))) return false;
  c.saturates = !(ValueOf(c.raw) < static_cast<T>(kMostAlpha));
  c.alpha = c.saturates ? Constant<N>(static_cast<T>(kMostAlpha)) : c.raw;
  return true;
}

// Channel c of those that a walk takes.
template <int kC, class N, class T, class S>
__device__ __forceinline__ N Channel(const S& staged, int i, const Row<N, T>& channels, int channel_count, int first,
                                     int c) {
  if constexpr (kC <= 4) {
    return staged.channel[i][c];
  } else {
    return first + c < channel_count ? channels[int64_t{staged.owner[i]} * channel_count + first + c] : N{};
  }
}

// kC channels at a time.
template <class T, class N, int kC>
__global__ void __launch_bounds__(kThreads, sizeof(N) == 4 && kC <= 4 ? 4 : 1)
    Forward(const __grid_constant__ Splat<T> args) {
  constexpr int kEntries = sizeof(N) > 8 ? 128 : 256;
  constexpr bool kDual = !std::is_same_v<N, T>;
  __shared__ Staged<N, kEntries, kC> staged;
  const int tiles = TileCount(args.screen), C = args.channel_count;
  const int64_t b = blockIdx.x / tiles, pixels = int64_t{args.screen.width} * args.screen.height;
  const Walk<T> walk(args, b, static_cast<int>(blockIdx.x - b * tiles));
  const Pixel<T> pixel(args.screen, walk.column, walk.row);
  const T x = static_cast<T>(pixel.x) + T(0.5), y = static_cast<T>(pixel.y) + T(0.5);
  const Row<N, T> channels(args.channels, args.batch, b), background(args.background, args.batch, b);
#pragma unroll 1
  for (int first = 0; first < C; first += kC) {
    N image[kC] = {}, through = Constant<N>(T(1));
    int32_t last = 0;
    bool open = pixel.inside;
    for (int32_t base = 0; base < walk.count; base += kEntries) {
      if (__syncthreads_count(open) == 0) break;
      if (threadIdx.x < kEntries) Stage(args, b, walk, int64_t{base} + threadIdx.x, threadIdx.x, staged);
      __syncthreads();
#pragma unroll 1
      for (int some = 0; some < kEntries; some += kWarp) {
        unsigned bits = EntriesOfWarp(staged, some);
        if (!__any_sync(kFullMask, open)) break;
        for (; bits != 0; bits &= bits - 1) {
          const int i = some + __ffs(bits) - 1;
          Cover<N> cover;
          if (!open || !Covers(staged.flat[i], x, y, cover)) continue;
          const N after = through * (Constant<N>(T(1)) - cover.alpha);
          if (!(ValueOf(after) >= static_cast<T>(kLeastThrough))) {
            open = false;
            continue;
          }
          const N weight = cover.alpha * through;
#pragma unroll
          for (int c = 0; c < kC; ++c) {
            image[c] = Fma(weight, Channel<kC>(staged, i, channels, C, first, c), image[c]);
          }
          through = after;
          last = base + i + 1;
        }
        __syncwarp();
      }
    }
    if (pixel.inside) {
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        if (first + c >= C) break;
        args.image[(b * pixels + pixel.number) * C + first + c] = Result(Fma(through, background[first + c], image[c]));
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
template <class T>
struct Left {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, unsigned long long>;
  int width;                 // gradients in mean, conic and opacity, then in channels if they are wanted
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
  static constexpr bool kDual = !std::is_same_v<N, T>;
  static constexpr int kOfMoments = kDual ? 2 * kMoments : kMoments, kWidth = kOfMoments + kC;
  // Entries staged at a time, and those of them that a warp sums at a time: shared memory has room for them.
  static constexpr int kEntries = kC > 4 || sizeof(T) == 8 ? 16 : 64;
  static constexpr int kGroup = sizeof(N) == 4 ? 8 : sizeof(N) == 8 ? 4 : 2;
  static constexpr int kWords = (kEntries + kWarp - 1) / kWarp;

  // What a warp has: its pixels' cotangents; and of entries that it has been through, q̄ and weight at each pixel.
  struct OfWarp {
    alignas(16) N ct[kWarp][kC];
    N q_bar[kGroup][kWarp + 1], weight[kGroup][kWarp + 1];  // rows are in banks of their own
    int32_t entry[kGroup];
    T sums[kEntries][kWidth];
    unsigned touched[kWords];
    T of_background[kC];
    int32_t last;
  };
  struct Shared {
    Staged<N, kWords * kWarp, kC> staged;
    OfWarp warp[kWarps];
  };

  // Sums over the warp's pixels, of n entries. A lane has an entry and a part of the pixels.
  static __device__ __forceinline__ void SumPixels(const Staged<N, kWords * kWarp, kC>& staged, OfWarp& mine, int n,
                                                   T left, T top) {
    const int lane = threadIdx.x % kWarp, e = lane % kGroup, first = lane / kGroup * kGroup;
    __syncwarp();
    const bool there = e < n;
    const int i = there ? mine.entry[e] : 0;
    const N gx = there ? staged.flat[i].x : N{}, gy = there ? staged.flat[i].y : N{};
    const N dy = gy - Constant<N>(top + static_cast<T>(first / kWarpColumns) + T(0.5));
    N moments[kMoments] = {};
    T channels[kC] = {};
#pragma unroll
    for (int s = 0; s < kGroup; ++s) {
      const int p = first + s;
      const N q_bar = there ? mine.q_bar[e][p] : N{}, weight = there ? mine.weight[e][p] : N{};
      const N dx = gx - Constant<N>(left + static_cast<T>(p % kWarpColumns) + T(0.5));
      const N q_dx = q_bar * dx, q_dy = q_bar * dy;
      moments[0] = moments[0] + q_bar;
      moments[1] = moments[1] + q_dx;
      moments[2] = moments[2] + q_dy;
      moments[3] = Fma(q_dx, dx, moments[3]);
      moments[4] = Fma(q_dx, dy, moments[4]);
      moments[5] = Fma(q_dy, dy, moments[5]);
#pragma unroll
      for (int c = 0; c < kC; ++c) {
        if constexpr (kDual) {
          const N g = mine.ct[p][c];
          channels[c] = Fma(weight.value, g.tangent, Fma(weight.tangent, g.value, channels[c]));
        } else {
          channels[c] = Fma(weight, mine.ct[p][c], channels[c]);
        }
      }
    }
    const auto over_parts = [&](int k, T sum) {
#pragma unroll
      for (int step = kGroup; step < kWarp; step *= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
      if (there && first == 0) mine.sums[i][k] = sum;
    };
#pragma unroll
    for (int m = 0; m < kMoments; ++m) {
      over_parts(m, ValueOf(moments[m]));
      if constexpr (kDual) over_parts(kMoments + m, moments[m].tangent);
    }
#pragma unroll
    for (int c = 0; c < kC; ++c) over_parts(kOfMoments + c, channels[c]);
    __syncwarp();
  }

  // Of entry i, the k-th Gaussian of the tile, whose sums are complete.
  static __device__ void Leave(const Splat<T>& args, const Walk<T>& walk, const Left<T>& to, const Shared& shared,
                               int i, int32_t k, int first, int pass, int log_terms) {
    const T* sums = shared.warp[0].sums[i];
    const int64_t row = (walk.listed ? walk.slots[walk.begin + k] : shared.staged.owner[i]) * int64_t{to.width};
    unsigned touched = 0;
    for (int w = 0; w < kWarps; ++w) touched |= shared.warp[w].touched[i / kWarp] >> i % kWarp & 1;
    if (touched == 0 && !walk.listed) return;
    const auto leave = [&](int n, T term) {
      if (walk.listed) {
        to.slots[row + n] = term;
      } else if (term == 0) {
        return;
      } else if (pass == 0) {
        atomicMax(to.largest + row + n, Magnitude(term));
      } else if (const double largest = FromMagnitude(to.largest[row + n]); largest - largest == 0) {
        const double whole = ldexp(static_cast<double>(term), Shift(largest, log_terms));
        atomicAdd(to.sums + row + n, static_cast<unsigned long long>(__double2ll_rn(whole)));
      }
    };
    N moments[kMoments] = {}, bar[kMoments] = {};
    if (touched != 0) {
#pragma unroll
      for (int m = 0; m < kMoments; ++m) {
        if constexpr (kDual) {
          moments[m] = {sums[m], sums[kMoments + m]};
        } else {
          moments[m] = sums[m];
        }
      }
      FromMoments(shared.staged.flat[i], moments, bar);
    }
#pragma unroll
    for (int m = 0; m < kMoments; ++m) {
      leave(m, walk.listed && first > 0 ? to.slots[row + m] + Result(bar[m]) : Result(bar[m]));
    }
    if (to.width == kMoments) return;
    for (int c = 0; c < kC && first + c < args.channel_count; ++c) leave(kMoments + first + c, sums[kOfMoments + c]);
  }
};

template <class T, class N, int kC>
__global__ void __launch_bounds__(kThreads, kC > 4 || sizeof(N) > 8 ? 1
                                            : sizeof(N) == 8        ? 2
                                                                    : 3)
    Backward(const __grid_constant__ Splat<T> args, int64_t b, const __grid_constant__ Left<T> left_over, int pass,
             int log_terms) {
  using B = Back<T, N, kC>;
  constexpr bool kDual = B::kDual;
  constexpr int kEntries = B::kEntries;
  extern __shared__ double2 memory[];
  auto& shared = *reinterpret_cast<typename B::Shared*>(memory);
  const int C = args.channel_count, lane = threadIdx.x % kWarp;
  auto& mine = shared.warp[threadIdx.x / kWarp];
  const Walk<T> walk(args, b, static_cast<int>(blockIdx.x));
  if (walk.listed && pass > 0) return;
  const int64_t pixels = int64_t{args.screen.width} * args.screen.height;
  const Pixel<T> pixel(args.screen, walk.column, walk.row);
  const T x = static_cast<T>(pixel.x) + T(0.5), y = static_cast<T>(pixel.y) + T(0.5);
  // Where the warp's pixels begin.
  const T left = static_cast<T>(pixel.x - lane % kWarpColumns), top_row = static_cast<T>(pixel.y - lane / kWarpColumns);
  const Row<N, T> channels(args.channels, args.batch, b), background(args.background, args.batch, b);
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
  __syncthreads();
  int32_t block_last = 0;
  for (int w = 0; w < kWarps; ++w) block_last = max(block_last, shared.warp[w].last);

  if (walk.listed) {  // nothing is left of pairs behind
    for (int64_t i = threadIdx.x; i < int64_t{walk.count - block_last} * left_over.width; i += kThreads) {
      const int64_t slot = walk.slots[walk.begin + block_last + i / left_over.width];
      left_over.slots[slot * left_over.width + i % left_over.width] = 0;
    }
  }

#pragma unroll 1
  for (int first = 0; first < C; first += kC) {
    N ct[kC], behind = {}, through = end;
    if (pixel.inside && first == 0 && alpha_ct.given()) behind = -alpha_ct[pixel.number];
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      ct[c] = N{};
      if (pixel.inside && image_ct.given() && first + c < C) {
        ct[c] = image_ct[pixel.number * C + first + c];
        behind = Fma(background[first + c], ct[c], behind);
      }
      const T sum = WarpSum(Result(end * ct[c]));
      if (lane == 0) mine.of_background[c] = sum;
      mine.ct[lane][c] = ct[c];
    }
    behind = behind * end;
    __syncthreads();
    if (pass == 0 && threadIdx.x < kC && first + static_cast<int>(threadIdx.x) < C) {
      T sum = 0;
      for (int w = 0; w < kWarps; ++w) sum += shared.warp[w].of_background[threadIdx.x];
      left_over.of_background[int64_t{blockIdx.x} * C + first + threadIdx.x] = sum;
    }

    for (int32_t top = block_last; top > 0; top -= kEntries) {
      const int32_t base = top - kEntries;  // may be negative: then the first entries are none
      if (threadIdx.x < B::kWords * kWarp) {
        const int i = threadIdx.x;
        if (i < kEntries) {
          Stage(args, b, walk, int64_t{base} + i, i, shared.staged);
        } else {
          shared.staged.warps[i] = 0;
        }
      }
      __syncthreads();
      int n = 0;  // entries whose pixels are not summed yet
#pragma unroll 1
      for (int word = B::kWords - 1; word >= 0; --word) {
        unsigned touched = 0;
        for (unsigned bits = EntriesOfWarp(shared.staged, word * kWarp); bits != 0;) {
          const int bit = 31 - __clz(bits), i = word * kWarp + bit;
          bits &= ~(1u << bit);
          if (base + i >= warp_last) continue;
          Cover<N> cover;
          const bool counts = base + i < last && Covers(shared.staged.flat[i], x, y, cover);
          if (!__any_sync(kFullMask, counts)) continue;
          touched |= 1u << bit;
          N weight = {}, q_bar = {};
          if (counts) {
            const N rest = Reciprocal(Constant<N>(T(1)) - cover.alpha), before = through * rest;
            weight = cover.alpha * before;
            N u = {};
#pragma unroll
            for (int c = 0; c < kC; ++c) u = Fma(Channel<kC>(shared.staged, i, channels, C, first, c), ct[c], u);
            const N alpha_bar = rest * (through * u - behind);
            if (!cover.saturates) q_bar = cover.raw * alpha_bar;
            behind = Fma(weight, u, behind);
            through = before;
          }
          mine.q_bar[n][lane] = q_bar, mine.weight[n][lane] = weight;
          if (lane == 0) mine.entry[n] = i;
          if (++n == B::kGroup) {
            B::SumPixels(shared.staged, mine, n, left, top_row);
            n = 0;
          }
        }
        if (lane == 0) mine.touched[word] = touched;
      }
      if (n > 0) B::SumPixels(shared.staged, mine, n, left, top_row);
      __syncthreads();
      // Over warps, in their order; each sum by one thread.
      for (int j = threadIdx.x; j < kEntries * B::kWidth; j += kThreads) {
        const int i = j / B::kWidth, n = j % B::kWidth;
        T sum = 0;
        for (int w = 0; w < kWarps; ++w) {
          const auto& of_warp = shared.warp[w];
          if (of_warp.touched[i / kWarp] >> i % kWarp & 1) sum += of_warp.sums[i][n];
        }
        shared.warp[0].sums[i][n] = sum;
      }
      __syncthreads();
      if (threadIdx.x < kEntries && base + static_cast<int>(threadIdx.x) >= 0) {
        const int i = threadIdx.x;
        B::Leave(args, walk, left_over, shared, i, base + i, first, pass, log_terms);
      }
      __syncthreads();
    }
  }
}

template <class T>
__device__ __forceinline__ bool Listed(const Splat<T>& args, int64_t b) {
  return At(args.lists.offsets, args.batch, b)[args.P] <= args.capacity;
}

template <class T>
__global__ void ClearSums(const __grid_constant__ Splat<T> args, int64_t b, const __grid_constant__ Left<T> left_over) {
  if (Listed(args, b)) return;
  const int64_t size = args.P * left_over.width, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < size; i += step) {
    left_over.sums[i] = 0, left_over.largest[i] = 0;
  }
}

// What all tiles leave of a Gaussian: a warp has it, with as many of its pairs at a time as there are lanes for their
// numbers.
template <class T>
__global__ void __launch_bounds__(kThreads) SumPairs(const __grid_constant__ Splat<T> args, int64_t b,
                                                     const __grid_constant__ Left<T> left_over, int log_terms) {
  const int64_t r = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (r >= args.P) return;
  const int lane = threadIdx.x % kWarp, width = left_over.width, C = args.channel_count;
  const int64_t g = At(args.lists.order, args.batch, b)[r], at_g = b * args.P + g;
  const int32_t* offsets = At(args.lists.offsets, args.batch, b);
  const bool listed = Listed(args, b);
  const auto write = [&](int n, T sum) {
    if (n < 2) {
      if (args.means_bar != nullptr) args.means_bar[at_g * 2 + n] = sum;
    } else if (n < 5) {
      if (args.conics_bar != nullptr) args.conics_bar[at_g * 3 + n - 2] = sum;
    } else if (n == 5) {
      if (args.opacities_bar != nullptr) args.opacities_bar[at_g] = sum;
    } else {
      args.channels_bar[at_g * C + n - kMoments] = sum;
    }
  };
  if (!listed) {
    for (int n = lane; n < width; n += kWarp) {
      const double largest = FromMagnitude(left_over.largest[g * width + n]);
      const double sum = static_cast<double>(static_cast<long long>(left_over.sums[g * width + n]));
      const bool finite = largest - largest == 0;
      write(n, static_cast<T>(!finite        ? largest - largest
                              : largest == 0 ? 0.0
                                             : ldexp(sum, -Shift(largest, log_terms))));
    }
    return;
  }
  const int64_t begin = offsets[r], end = offsets[r + 1];
  const int together = width < kWarp ? kWarp / width : 1;  // pairs at a time
  for (int first = 0; first < width; first += kWarp) {
    const int n = first + (together > 1 ? lane % width : lane), pair = together > 1 ? lane / width : 0;
    T sum = 0;
    if (pair < together && n < width) {
#pragma unroll 4
      for (int64_t s = begin + pair; s < end; s += together) sum += left_over.slots[s * width + n];
    }
    T total = sum;
    for (int other = 1; other < together; ++other) {
      total += __shfl_sync(kFullMask, sum, (lane + other * width) % kWarp);  // right in the first `width` lanes
    }
    if (pair == 0 && n < width) write(n, total);
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
  const int width = kMoments + (args.channels_bar != nullptr ? C : 0);
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
    if (args.P > 0) SumPairs<<<Blocks(args.P * kWarp), kThreads, 0, stream>>>(args, b, left_over, log_terms);
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

// Of many channels, so many at a time.
template <class N>
constexpr int kMany = sizeof(N) == 4 ? 32 : 16;

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
  return few ? LaunchBackward<T, T, 4>(args, at, bytes, stream)
             : LaunchBackward<T, T, kMany<T>>(args, at, bytes, stream);
}
template cudaError_t LaunchSplatBackward(const Splat<float>&, void*, int64_t, cudaStream_t);
template cudaError_t LaunchSplatBackward(const Splat<double>&, void*, int64_t, cudaStream_t);

}  // namespace knn
