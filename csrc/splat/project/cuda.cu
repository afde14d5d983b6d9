// Projection on CUDA: a thread a Gaussian, a warp 32 neighbouring ones, blocks of warps that have nothing in common.
//
// Most of what is read and written are rows of coefficients, a Gaussian's being longer than a cache line. So a warp
// brings rows to shared memory, and takes gradients from there, with neighbouring lanes at neighbouring numbers: of
// Gaussians that are drawn, whose place is known before. Other arrays of several numbers a Gaussian are written so.

#include <type_traits>

#include "common/cuda.cuh"
#include "splat/project/cuda.h"
#include "splat/project/formulas.h"

namespace knn::KNN_ISA {
namespace {

template <class T>
struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

__device__ __forceinline__ int Lane() { return threadIdx.x % kWarp; }

// Calls run(places) for all places of kWarp rows of so many columns, for some at a time, of which the last may be in
// rows beyond. Neighbouring lanes have neighbouring places.
constexpr int kPlaces = 4;
struct Place {
  int row, column;
};
template <class F>
__device__ __forceinline__ void ForPlaces(int columns, F&& run) {
  Place at = {Lane() / columns, Lane() % columns};
  const Place step = {kWarp / columns, kWarp % columns};
  for (int n = 0; n < columns; n += kPlaces) {
    Place places[kPlaces];
#pragma unroll
    for (Place& place : places) {
      place = at;
      at.row += step.row, at.column += step.column;
      if (at.column >= columns) at.column -= columns, ++at.row;
    }
    run(places);
  }
}

// Rows of coefficients of a warp: `used` numbers of each are of interest, `stride` from row to row.
template <class T>
struct Rows {
  static constexpr int kPacket = Packet<T>::kSize;
  // In shared memory, so that packets of neighbouring lanes are in different banks.
  static constexpr int kStride = 3 * kMostHarmonics + kPacket;

  int used, stride;

  __device__ __forceinline__ bool packed(const T* a) const {
    return used % kPacket == 0 && stride % kPacket == 0 && reinterpret_cast<uintptr_t>(a) % sizeof(Packet<T>) == 0;
  }

  // P is T or a packet. Bit l of `which`: row l is wanted.
  template <class P>
  __device__ __forceinline__ void Fetch(const P* a, int columns, uint32_t which, P* shared) const {
    constexpr int kOf = sizeof(P) / sizeof(T);
    const auto wanted = [&](Place at) { return at.row < kWarp && (which >> at.row & 1) != 0; };
    ForPlaces(columns, [&](const Place(&places)[kPlaces]) {
      P x[kPlaces];
#pragma unroll
      for (int j = 0; j < kPlaces; ++j) {
        if (wanted(places[j])) x[j] = a[int64_t{places[j].row} * (stride / kOf) + places[j].column];
      }
#pragma unroll
      for (int j = 0; j < kPlaces; ++j) {
        if (wanted(places[j])) shared[places[j].row * (kStride / kOf) + places[j].column] = x[j];
      }
    });
  }
  __device__ __forceinline__ void Fetch(const T* a, uint32_t which, T* shared) const {
    __syncwarp();
    if (packed(a)) {
      const auto packets = reinterpret_cast<const Packet<T>*>(a);
      Fetch(packets, used / kPacket, which, reinterpret_cast<Packet<T>*>(shared));
    } else {
      Fetch(a, used, which, shared);
    }
    __syncwarp();
  }

  // Writes `rows` rows, 0 where `which` does not say that there is one in shared memory; or adds those that are.
  template <class P>
  __device__ __forceinline__ void Write(const P* shared, int columns, uint32_t which, int rows, bool add, P* a) const {
    constexpr int kOf = sizeof(P) / sizeof(T);
    ForPlaces(columns, [&](const Place(&places)[kPlaces]) {
#pragma unroll
      for (const Place& at : places) {
        if (at.row >= rows) continue;
        const bool there = (which >> at.row & 1) != 0;
        P x = {};
        if (there) x = shared[at.row * (kStride / kOf) + at.column];
        P* const to = a + int64_t{at.row} * (stride / kOf) + at.column;
        if (add) {
          if (!there) continue;
          x = Sum(x, *to);
        }
        *to = x;
      }
    });
  }
  static __device__ __forceinline__ T Sum(T a, T b) { return a + b; }
  static __device__ __forceinline__ Packet<T> Sum(Packet<T> a, const Packet<T>& b) {
#pragma unroll
    for (int k = 0; k < kPacket; ++k) a.x[k] += b.x[k];
    return a;
  }
  __device__ __forceinline__ void Write(const T* shared, uint32_t which, int rows, bool add, T* a) const {
    __syncwarp();
    if (packed(a)) {
      const auto packets = reinterpret_cast<const Packet<T>*>(shared);
      Write(packets, used / kPacket, which, rows, add, reinterpret_cast<Packet<T>*>(a));
    } else {
      Write(shared, used, which, rows, add, a);
    }
    // Numbers that do not count.
    const int rest = stride - used;
    for (int k = Lane(); !add && k < rows * rest; k += kWarp) a[int64_t{k / rest} * stride + used + k % rest] = 0;
    __syncwarp();
  }
};

// Writes or adds n numbers of each of a warp's Gaussians, of which `rows` are there, through shared memory.
template <class T, int n>
__device__ __forceinline__ void WriteNumbers(const T (&x)[n], T* shared, int rows, T* a, bool add = false) {
  __syncwarp();
#pragma unroll
  for (int k = 0; k < n; ++k) shared[Lane() * n + k] = x[k];
  __syncwarp();
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const int at = k * kWarp + Lane();
    if (at < rows * n) a[at] = add ? a[at] + shared[at] : shared[at];
  }
}

template <class T, bool kDual>
struct Block {
  using N = std::conditional_t<kDual, Dual<T>, T>;
  static constexpr int kThreads = 512 / sizeof(N), kWarps = kThreads / kWarp;
  struct Memory {
    alignas(16) T rows[kDual ? 2 : 1][kWarp * Rows<T>::kStride];  // of values, of tangents
    T numbers[kWarp * 9];
  };
};

// Batch entries are launched one by one, each with arguments of its own, as if it were alone.
template <class T>
Projection<T> EntryOf(const Projection<T>& args, int64_t b, int64_t c) {
  Projection<T> e = args;
  const auto input = [&](Input<T>& x) {
    x = {{AtOrNull(x.value, args.batch, b), {}}, {AtOrNull(x.tangent, args.batch, b), {}}};
  };
  for (Input<T>* x : {&e.means, &e.quats, &e.scales, &e.covariances, &e.opacities, &e.offset, &e.colors, &e.camera,
                      &e.means2d_ct, &e.conics_ct, &e.opacities_ct, &e.channels_ct}) {
    input(*x);
  }
  e.usable = {At(args.usable, args.batch, b), {}};
  const auto result = [](auto& data, int64_t offset) {
    if (data != nullptr) data += offset;
  };
  const int64_t P = args.P, size = args.camera_size();
  result(e.means2d, b * P * 2), result(e.conics, b * P * 3), result(e.opacities_out, b * P);
  result(e.channels, b * P * args.channel_count()), result(e.depths, b * P), result(e.radii, b * P);
  result(e.reach, b * P * 4), result(e.camera_bar, b * size), result(e.camera_parts, b * size * WarpsOf(P));
  result(e.means_bar, c * P * 3), result(e.quats_bar, c * P * 4), result(e.scales_bar, c * P * 3);
  result(e.covariances_bar, c * P * 9), result(e.opacities_bar, c * P), result(e.offset_bar, c * P * 2);
  result(e.colors_bar, c * P * args.M * 3);
  return e;
}

// An input of such an entry.
template <class N, class T>
__device__ __forceinline__ Row<N, T> RowOf(const Input<T>& input) {
  return Row<N, T>(input, Batch{}, 0);
}

// What is known of a Gaussian before its colour is.
template <class T, class N>
struct Gaussian {
  Camera<N> camera;
  Point<N> mean;
  N opacity;
  Quaternion<N> quat;
  Ellipsoid<N> ellipsoid;
  Symmetric<N> symmetric;  // instead of the two
  View<N> view;

  __device__ __forceinline__ Gaussian(const Projection<T>& args, int64_t i) : camera(CameraOf(args)) {
    const auto point = [&](const Row<N, T>& a) { return Point<N>{a[3 * i], a[3 * i + 1], a[3 * i + 2]}; };
    mean = point(RowOf<N>(args.means));
    opacity = RowOf<N>(args.opacities)[i];
    Locate(camera, mean, view);
    if (args.covariances.value.data != nullptr) {
      const Row<N, T> m = RowOf<N>(args.covariances);
      N entries[9];
#pragma unroll
      for (int k = 0; k < 9; ++k) entries[k] = m[9 * i + k];
      symmetric = SymmetricPart(entries);
      view.bare = SeenAlong(symmetric, view.a, view.b, view.w);
    } else {
      const Row<N, T> q = RowOf<N>(args.quats);
      quat = {q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]};
      ellipsoid = EllipsoidOf(quat, point(RowOf<N>(args.scales)));
      view.bare = SeenAlong(ellipsoid, view.a, view.b, view.w);
    }
    Flatten(args.eps2d, args.antialiased, view);
    if (args.offset.value.data != nullptr) {
      const Row<N, T> offset = RowOf<N>(args.offset);
      view.u = view.u + offset[2 * i], view.v = view.v + offset[2 * i + 1];
    }
  }

  static __device__ __forceinline__ Camera<N> CameraOf(const Projection<T>& args) {
    const Row<N, T> row = RowOf<N>(args.camera);
    return Camera<N>([&](int k) { return row[k]; }, args.screen, args.camera_size());
  }
};

// Blocks of a multiprocessor: what is wanted of the memory system asks for so many.
template <class T, bool kDual, bool kGradients>
inline constexpr int kBlocks = sizeof(T) == 4 && !kDual ? (kGradients ? 5 : 6) : 1;

// In three parts, the second of which has no registers to spare for what is found in the first: who is drawn; colours
// and gradients of coefficients; and again, from what is in the cache by then, the view, and gradients of all else.
template <class T, bool kDual, bool kGradients>
__global__ void __launch_bounds__(Block<T, kDual>::kThreads, kBlocks<T, kDual, kGradients>)
    ProjectionKernel(const __grid_constant__ Projection<T> args, bool add) {
  using Block = Block<T, kDual>;
  using N = typename Block::N;
  __shared__ typename Block::Memory memories[Block::kWarps];
  typename Block::Memory& memory = memories[threadIdx.x / kWarp];
  const int64_t warp = int64_t{blockIdx.x} * Block::kWarps + threadIdx.x / kWarp, first = warp * kWarp;
  if (first >= args.P) return;
  const int rows = static_cast<int>(args.P - first < kWarp ? args.P - first : kWarp);
  const int64_t i = first + (Lane() < rows ? Lane() : rows - 1);
  const Rows<T> sh_rows = {3 * (args.degree + 1) * (args.degree + 1), 3 * args.M};

  const Gaussian<T, N> seen(args, i);
  bool drawn = *args.usable.data != 0 && Lane() < rows && IsSeen(args.near, args.far, seen.view, seen.opacity);

  N color[3] = {};
  Point<N> centre_bar = {};
  if (args.has_colors()) {
    const uint32_t which = __ballot_sync(kFullMask, drawn);
    const bool move = kDual && args.colors.tangent.data != nullptr;
    if (which != 0) {
      const auto fetch = [&](const Operand<const T>& a, int k) {
        sh_rows.Fetch(a.data + first * sh_rows.stride, which, memory.rows[k]);
      };
      fetch(args.colors.value, 0);
      if (move) fetch(args.colors.tangent, kDual ? 1 : 0);
      T* const values = memory.rows[0] + Lane() * Rows<T>::kStride;
      const T* const tangents = memory.rows[kDual ? 1 : 0] + Lane() * Rows<T>::kStride;
      const auto sh = [&](int k) -> N {
        if constexpr (kDual) {
          return {values[k], move ? tangents[k] : T(0)};
        } else {
          return values[k];
        }
      };
      const Sight<N> sight = SightOf(seen.mean, seen.camera.centre);
      N harmonics[kMostHarmonics];
      Harmonics(args.degree, sight.direction, harmonics);
      Colors(args.degree, harmonics, sh, color);
      T sum = 0;
      for (const N& part : color) sum += ValueOf(part) - ValueOf(part);
      drawn = drawn && IsZero(sum);
      if constexpr (kGradients) {
        const Cotangent<N, T> ct(args.channels_ct, Batch{}, 0);
        N color_bar[3];
#pragma unroll
        for (int k = 0; k < 3; ++k) color_bar[k] = ValueOf(color[k]) > 0 && ct.given() ? ct[4 * i + k] : N{};
        centre_bar = Point<N>{} - PullColors(args.degree, sight, sh, color_bar);
        if (args.colors_bar != nullptr) {
          ForHarmonics(args.degree, [&](int m) {
#pragma unroll
            for (int k = 0; k < 3; ++k) values[3 * m + k] = Result(harmonics[m] * color_bar[k]);
          });
        }
      }
    }
    if (kGradients && args.colors_bar != nullptr) {
      const uint32_t still = __ballot_sync(kFullMask, drawn);
      sh_rows.Write(memory.rows[0], still, rows, add, args.colors_bar + first * sh_rows.stride);
    }
  }

  const auto shown = [&](const N& x) { return drawn ? Result(x) : T(0); };
  const auto write_y = [&](const Gaussian<T, N>& seen) {
    const View<N>& view = seen.view;
    WriteNumbers<T, 2>({shown(view.u), shown(view.v)}, memory.numbers, rows, args.means2d + 2 * first);
    WriteNumbers<T, 3>({shown(view.conic[0]), shown(view.conic[1]), shown(view.conic[2])}, memory.numbers, rows,
                       args.conics + 3 * first);
    WriteNumbers<T, 1>({shown(seen.opacity * view.factor)}, memory.numbers, rows, args.opacities_out + first);
    if (args.has_colors()) {
      const auto clamped = [&](const N& x) { return ValueOf(x) > 0 ? shown(x) : T(0); };
      WriteNumbers<T, 4>({clamped(color[0]), clamped(color[1]), clamped(color[2]), shown(view.position.z)},
                         memory.numbers, rows, args.channels + 4 * first);
    } else {
      WriteNumbers<T, 1>({shown(view.position.z)}, memory.numbers, rows, args.channels + first);
    }
  };
  if constexpr (!kGradients) {
    write_y(seen);
    if constexpr (!kDual) {
      if (args.depths != nullptr && Lane() < rows) {
        const View<N>& view = seen.view;
        int32_t reach[4] = {}, radius = 0;
        if (drawn) radius = ReachOf(args.screen, view.u, view.v, view.xx, view.ellipse.xy, view.yy, reach);
        args.depths[first + Lane()] = static_cast<float>(shown(view.position.z));
        args.radii[first + Lane()] = radius;
        if (args.reach != nullptr) {
#pragma unroll
          for (int k = 0; k < 4; ++k) args.reach[4 * (first + Lane()) + k] = reach[k];
        }
      }
    }
  } else {
    __syncwarp();  // across which nothing that was loaded is kept
    const Gaussian<T, N> again(args, i);
    const View<N>& view = again.view;
    if (args.means2d != nullptr) write_y(again);
    const auto cotangent = [&](const Input<T>& input, int64_t k) {
      const Cotangent<N, T> ct(input, Batch{}, 0);
      return ct.given() ? ct[k] : N{};
    };
    const int channels = args.channel_count();
    const ViewCotangent<N> ct = {
        cotangent(args.means2d_ct, 2 * i),
        cotangent(args.means2d_ct, 2 * i + 1),
        {cotangent(args.conics_ct, 3 * i), cotangent(args.conics_ct, 3 * i + 1), cotangent(args.conics_ct, 3 * i + 2)},
        cotangent(args.opacities_ct, i),
        cotangent(args.channels_ct, channels * i + channels - 1)};
    ViewBar<N> bar = {};
    bar.centre = centre_bar;
    const Ellipse<N> bare_bar = PullFlatten(args.eps2d, args.antialiased, again.camera, view, again.opacity, ct, bar);
    const auto write = [&](const auto& x, T* a) {  // shown numbers
      constexpr int n = sizeof x / sizeof x[0];
      if (a != nullptr) WriteNumbers(x, memory.numbers, rows, a + n * first, add);
    };
    AlongBar<N> along;
    if (args.covariances.value.data != nullptr) {
      Symmetric<N> m;
      along = PullSeenAlong(again.symmetric, view.a, view.b, view.w, bare_bar, m);
      const T entries[9] = {shown(m.xx), shown(m.xy), shown(m.xz), shown(m.xy), shown(m.yy),
                            shown(m.yz), shown(m.xz), shown(m.yz), shown(m.zz)};
      write(entries, args.covariances_bar);
    } else {
      Ellipsoid<N> e;
      along = PullSeenAlong(again.ellipsoid, view.a, view.b, view.w, bare_bar, e);
      const T scales[3] = {shown(e.scale[0]), shown(e.scale[1]), shown(e.scale[2])};
      write(scales, args.scales_bar);
      const Quaternion<N> q = PullAxes(again.quat, e.axis);
      const T quat[4] = {shown(q.w), shown(q.x), shown(q.y), shown(q.z)};
      write(quat, args.quats_bar);
    }
    PullLocate(again.camera, view, ct, along, bar);
    const Point<N> mean_bar = PullMean(again.camera, bar);
    const T mean[3] = {shown(mean_bar.x), shown(mean_bar.y), shown(mean_bar.z)}, opacity[1] = {shown(bar.opacity)};
    const T offset[2] = {shown(ct.u), shown(ct.v)};
    write(mean, args.means_bar);
    write(opacity, args.opacities_bar);
    write(offset, args.offset_bar);
    if (args.camera_bar != nullptr) {
      const int size = args.camera_size();
      const int64_t warps = WarpsOf(args.P);
      PullCamera(again.mean, view, ct, bar, size, [&](int k, const N& g) {
        const T sum = WarpSum(shown(g));
        if (Lane() == 0) args.camera_parts[k * warps + warp] = sum;
      });
    }
  }
}

constexpr int kSumThreads = 256;

// A block sums what warps leave of a number of a camera, in an order that depends on their number alone.
template <class T>
__global__ void __launch_bounds__(kSumThreads) SumCamera(const T* parts, int64_t warps, T* camera_bar) {
  __shared__ double sums[kSumThreads / kWarp];
  const int64_t number = blockIdx.x;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < warps; k += kSumThreads) sum += parts[number * warps + k];
  sum = WarpSum(sum);
  if (Lane() == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0;
  for (double part : sums) sum += part;
  camera_bar[number] = static_cast<T>(sum);
}

template <class T, bool kDual, bool kGradients>
cudaError_t Launch(const Projection<T>& args, cudaStream_t stream) {
  constexpr int kThreads = Block<T, kDual>::kThreads;
  const int64_t kept = Count(args.kept), entries = Count(args.batch) / Max(1, kept);
  const int64_t blocks = CeilDiv(args.P, kThreads);
  const SplitBatch split = Split(args.batch, args.kept);
  for (int64_t c = 0; blocks > 0 && c < kept; ++c) {
    for (int64_t s = 0; s < entries; ++s) {
      const Projection<T> entry = EntryOf(args, Join(split, static_cast<uint32_t>(c), static_cast<uint32_t>(s)), c);
      ProjectionKernel<T, kDual, kGradients>
          <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(entry, /*add=*/s > 0);
    }
  }
  const int64_t numbers = args.camera_bar == nullptr ? 0 : Count(args.batch) * args.camera_size();
  if (numbers > 0) {
    SumCamera<T><<<static_cast<unsigned>(numbers), kSumThreads, 0, stream>>>(args.camera_parts, WarpsOf(args.P),
                                                                             args.camera_bar);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

template <class T>
cudaError_t LaunchProjection(const Projection<T>& args, cudaStream_t stream) {
  using namespace KNN_ISA;
  if (args.wants_gradients()) {
    return args.dual ? Launch<T, true, true>(args, stream) : Launch<T, false, true>(args, stream);
  }
  return args.dual ? Launch<T, true, false>(args, stream) : Launch<T, false, false>(args, stream);
}

template cudaError_t LaunchProjection(const Projection<float>&, cudaStream_t);
template cudaError_t LaunchProjection(const Projection<double>&, cudaStream_t);

}  // namespace knn
