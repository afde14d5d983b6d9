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

// Calls run(row, column) for all of 32 rows of so many columns, kAtOnce at a time, which are neighbours to neighbouring
// lanes: run(place) of several places, of which some may be in row 32 or beyond.
struct Place {
  int row, column;
};
template <class F>
__device__ __forceinline__ void ForPlaces(int columns, F&& run) {
  constexpr int kAtOnce = 4;
  Place at = {Lane() / columns, Lane() % columns};
  const Place step = {kWarp / columns, kWarp % columns};
  while (__any_sync(kFullMask, at.row < kWarp)) {
    Place places[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      places[j] = at;
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
    ForPlaces(columns, [&](const auto& places) {
      P x[sizeof places / sizeof(Place)];
#pragma unroll
      for (int j = 0; j < static_cast<int>(sizeof places / sizeof(Place)); ++j) {
        const Place at = places[j];
        if (at.row < kWarp && (which >> at.row & 1) != 0) x[j] = a[int64_t{at.row} * (stride / kOf) + at.column];
      }
#pragma unroll
      for (int j = 0; j < static_cast<int>(sizeof places / sizeof(Place)); ++j) {
        const Place at = places[j];
        if (at.row < kWarp && (which >> at.row & 1) != 0) shared[at.row * (kStride / kOf) + at.column] = x[j];
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
    ForPlaces(columns, [&](const auto& places) {
#pragma unroll
      for (int j = 0; j < static_cast<int>(sizeof places / sizeof(Place)); ++j) {
        const Place at = places[j];
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

// n numbers of each of a warp's Gaussians, of which `rows` are there, through shared memory.
template <class T, int n>
__device__ __forceinline__ void WriteNumbers(const T (&x)[n], T* shared, int rows, T* a) {
  if (n == 1) {
    if (Lane() < rows) a[Lane()] = x[0];
    return;
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < n; ++k) shared[Lane() * n + k] = x[k];
  __syncwarp();
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const int at = k * kWarp + Lane();
    if (at < rows * n) a[at] = shared[at];
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

// Two numbers of a Gaussian, and so on, from an array of n for each.
template <class N, class T>
__device__ __forceinline__ Point<N> PointAt(const Row<N, T>& a, int64_t i) {
  return {a[3 * i], a[3 * i + 1], a[3 * i + 2]};
}

template <class T, bool kDual, bool kGradients>
__global__ void __launch_bounds__(Block<T, kDual>::kThreads)
    ProjectionKernel(const __grid_constant__ Projection<T> args, const __grid_constant__ SplitBatch split,
                     uint32_t kept, uint32_t entries) {
  using Block = Block<T, kDual>;
  using N = typename Block::N;
  __shared__ typename Block::Memory memories[Block::kWarps];
  typename Block::Memory& memory = memories[threadIdx.x / kWarp];
  const uint32_t warps = static_cast<uint32_t>(WarpsOf(args.P));
  const uint32_t warp = blockIdx.x * Block::kWarps + threadIdx.x / kWarp, c = warp / warps, of_entry = warp - c * warps;
  if (c >= kept) return;
  const int64_t first = int64_t{of_entry} * kWarp;
  const int rows = static_cast<int>(args.P - first < kWarp ? args.P - first : kWarp);
  const int64_t i = first + (Lane() < rows ? Lane() : rows - 1);
  const bool matrices = args.covariances.value.data != nullptr;
  const Rows<T> sh_rows = {3 * (args.degree + 1) * (args.degree + 1), 3 * args.M};

  // Sums over batch entries. shape: a quaternion and scales, or the upper triangle of a matrix.
  T mean_sum[3] = {}, shape_sum[7] = {}, opacity_sum[1] = {}, offset_sum[2] = {};
  for (uint32_t s = 0; s < entries; ++s) {
    const uint32_t b = Join(split, c, s);
    const auto row_of = [&](const Input<T>& input) { return Row<N, T>(input, args.batch, b); };
    const Row<N, T> camera_row = row_of(args.camera);
    const Camera<N> camera([&](int k) { return camera_row[k]; }, args.screen, args.camera_size());
    const Point<N> mean = PointAt(row_of(args.means), i);
    const N opacity = row_of(args.opacities)[i];

    View<N> view;
    Locate(camera, mean, view);
    Quaternion<N> quat = {};
    Ellipsoid<N> ellipsoid = {};
    Symmetric<N> symmetric = {};
    if (matrices) {
      const Row<N, T> m = row_of(args.covariances);
      symmetric = SymmetricPart<N>({m[9 * i], m[9 * i + 1], m[9 * i + 2], m[9 * i + 3], m[9 * i + 4], m[9 * i + 5],
                                    m[9 * i + 6], m[9 * i + 7], m[9 * i + 8]});
      view.bare = SeenAlong(symmetric, view.a, view.b, view.w);
    } else {
      const Row<N, T> q = row_of(args.quats);
      quat = {q[4 * i], q[4 * i + 1], q[4 * i + 2], q[4 * i + 3]};
      ellipsoid = EllipsoidOf(quat, PointAt(row_of(args.scales), i));
      view.bare = SeenAlong(ellipsoid, view.a, view.b, view.w);
    }
    Flatten(args.eps2d, args.antialiased, view);
    if (args.offset.value.data != nullptr) {
      const Row<N, T> offset = row_of(args.offset);
      view.u = view.u + offset[2 * i], view.v = view.v + offset[2 * i + 1];
    }
    bool drawn = *At(args.usable, args.batch, b) != 0 && Lane() < rows && IsSeen(args.near, args.far, view, opacity);

    Sight<N> sight = {};
    N harmonics[kMostHarmonics], color[3] = {};
    T* const values = memory.rows[0] + Lane() * Rows<T>::kStride;
    T* const tangents = memory.rows[kDual ? 1 : 0] + Lane() * Rows<T>::kStride;
    const bool colors_move = kDual && args.colors.tangent.data != nullptr;
    const auto sh = [&](int k) -> N {
      if constexpr (kDual) {
        return {values[k], colors_move ? tangents[k] : T(0)};
      } else {
        return values[k];
      }
    };
    if (args.has_colors()) {
      const uint32_t which = __ballot_sync(kFullMask, drawn);
      const auto at = [&](const Operand<const T>& a) { return At(a, args.batch, b) + first * sh_rows.stride; };
      sh_rows.Fetch(at(args.colors.value), which, memory.rows[0]);
      if (colors_move) sh_rows.Fetch(at(args.colors.tangent), which, memory.rows[kDual ? 1 : 0]);
      if (drawn) {
        sight = SightOf(mean, camera.centre);
        Harmonics(args.degree, sight.direction, harmonics);
        Colors(args.degree, harmonics, sh, color);
        T sum = 0;
        for (const N& part : color) sum += ValueOf(part) - ValueOf(part);
        drawn = IsZero(sum);
      }
    }
    const auto shown = [&](const N& x) { return drawn ? Result(x) : T(0); };

    const int64_t to = b * args.P + first;
    if (args.means2d != nullptr) {
      WriteNumbers<T, 2>({shown(view.u), shown(view.v)}, memory.numbers, rows, args.means2d + 2 * to);
      WriteNumbers<T, 3>({shown(view.conic[0]), shown(view.conic[1]), shown(view.conic[2])}, memory.numbers, rows,
                         args.conics + 3 * to);
      WriteNumbers<T, 1>({shown(opacity * view.factor)}, memory.numbers, rows, args.opacities_out + to);
      if (args.has_colors()) {
        const auto clamped = [&](const N& x) { return ValueOf(x) > 0 ? shown(x) : T(0); };
        WriteNumbers<T, 4>({clamped(color[0]), clamped(color[1]), clamped(color[2]), shown(view.position.z)},
                           memory.numbers, rows, args.channels + 4 * to);
      } else {
        WriteNumbers<T, 1>({shown(view.position.z)}, memory.numbers, rows, args.channels + to);
      }
    }
    if constexpr (!kDual && !kGradients) {
      if (args.depths != nullptr && Lane() < rows) {
        int32_t reach[4] = {}, radius = 0;
        if (drawn) radius = ReachOf(args.screen, view.u, view.v, view.xx, view.ellipse.xy, view.yy, reach);
        args.depths[to + Lane()] = static_cast<float>(shown(view.position.z));
        args.radii[to + Lane()] = radius;
        if (args.reach != nullptr) {
#pragma unroll
          for (int k = 0; k < 4; ++k) args.reach[4 * (to + Lane()) + k] = reach[k];
        }
      }
    }
    if constexpr (kGradients) {
      T camera_part[kCameraSizeWithCentre] = {};
      if (drawn) {
        const auto cotangent = [&](const Input<T>& input) { return Cotangent<N, T>(input, args.batch, b); };
        const Cotangent<N, T> means2d_ct = cotangent(args.means2d_ct), conics_ct = cotangent(args.conics_ct);
        const Cotangent<N, T> opacities_ct = cotangent(args.opacities_ct), channels_ct = cotangent(args.channels_ct);
        const auto at = [](const Cotangent<N, T>& a, int64_t k) { return a.given() ? a[k] : N{}; };
        const int channels = args.channel_count();
        const ViewCotangent<N> ct = {at(means2d_ct, 2 * i),
                                     at(means2d_ct, 2 * i + 1),
                                     {at(conics_ct, 3 * i), at(conics_ct, 3 * i + 1), at(conics_ct, 3 * i + 2)},
                                     at(opacities_ct, i),
                                     at(channels_ct, channels * i + channels - 1)};
        ViewBar<N> bar = {};
        if (args.has_colors()) {
          N color_bar[3];
#pragma unroll
          for (int k = 0; k < 3; ++k) color_bar[k] = ValueOf(color[k]) > 0 ? at(channels_ct, 4 * i + k) : N{};
          bar.centre = Point<N>{} - PullColors(args.degree, sight, sh, color_bar);
          if (args.colors_bar != nullptr) {
            ForHarmonics(args.degree, [&](int m) {
#pragma unroll
              for (int k = 0; k < 3; ++k) values[3 * m + k] = Result(harmonics[m] * color_bar[k]);
            });
          }
        }
        const Ellipse<N> bare_bar = PullFlatten(args.eps2d, args.antialiased, camera, view, opacity, ct, bar);
        AlongBar<N> along;
        if (matrices) {
          Symmetric<N> m;
          along = PullSeenAlong(symmetric, view.a, view.b, view.w, bare_bar, m);
          const N entries[6] = {m.xx, m.xy, m.xz, m.yy, m.yz, m.zz};
#pragma unroll
          for (int k = 0; k < 6; ++k) shape_sum[k] += Result(entries[k]);
        } else {
          Ellipsoid<N> e_bar;
          along = PullSeenAlong(ellipsoid, view.a, view.b, view.w, bare_bar, e_bar);
          const Quaternion<N> q = PullAxes(quat, e_bar.axis);
          shape_sum[0] += Result(q.w), shape_sum[1] += Result(q.x), shape_sum[2] += Result(q.y);
          shape_sum[3] += Result(q.z);
#pragma unroll
          for (int k = 0; k < 3; ++k) shape_sum[4 + k] += Result(e_bar.scale[k]);
        }
        PullLocate(camera, view, ct, along, bar);
        const Point<N> mean_bar = PullMean(camera, bar);
        mean_sum[0] += Result(mean_bar.x), mean_sum[1] += Result(mean_bar.y), mean_sum[2] += Result(mean_bar.z);
        opacity_sum[0] += Result(bar.opacity);
        offset_sum[0] += Result(ct.u), offset_sum[1] += Result(ct.v);
        if (args.camera_bar != nullptr) {
          PullCamera(mean, view, ct, bar, kCameraSizeWithCentre, [&](int k, N g) { camera_part[k] = Result(g); });
        }
      }
      if (args.colors_bar != nullptr) {
        const uint32_t which = __ballot_sync(kFullMask, drawn);
        T* const a = args.colors_bar + (c * args.P + first) * sh_rows.stride;
        sh_rows.Write(memory.rows[0], which, rows, s > 0, a);
      }
      if (args.camera_bar != nullptr) {
        const int size = args.camera_size();
        T* const parts = args.camera_parts + b * size * int64_t{warps} + of_entry;
#pragma unroll
        for (int k = 0; k < kCameraSizeWithCentre; ++k) {
          const T sum = WarpSum(camera_part[k]);
          if (k < size && Lane() == 0) parts[k * int64_t{warps}] = sum;
        }
      }
    }
  }
  if constexpr (kGradients) {
    const int64_t to = c * args.P + first;
    const auto& m = shape_sum;
    if (args.means_bar != nullptr) WriteNumbers(mean_sum, memory.numbers, rows, args.means_bar + 3 * to);
    if (args.quats_bar != nullptr) {
      WriteNumbers<T, 4>({m[0], m[1], m[2], m[3]}, memory.numbers, rows, args.quats_bar + 4 * to);
    }
    if (args.scales_bar != nullptr) {
      WriteNumbers<T, 3>({m[4], m[5], m[6]}, memory.numbers, rows, args.scales_bar + 3 * to);
    }
    if (args.covariances_bar != nullptr) {
      WriteNumbers<T, 9>({m[0], m[1], m[2], m[1], m[3], m[4], m[2], m[4], m[5]}, memory.numbers, rows,
                         args.covariances_bar + 9 * to);
    }
    if (args.opacities_bar != nullptr) WriteNumbers(opacity_sum, memory.numbers, rows, args.opacities_bar + to);
    if (args.offset_bar != nullptr) WriteNumbers(offset_sum, memory.numbers, rows, args.offset_bar + 2 * to);
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
  constexpr int kThreads = Block<T, kDual>::kThreads, kWarps = Block<T, kDual>::kWarps;
  const int64_t kept = Count(args.kept), entries = Count(args.batch) / Max(1, kept);
  const int64_t warps = kept * WarpsOf(args.P), blocks = CeilDiv(warps, kWarps);
  if (cudaError_t error = CheckGrid(warps); error != cudaSuccess) return error;
  if (blocks > 0) {
    const SplitBatch split = Split(args.batch, args.kept);
    const uint32_t kept_entries = static_cast<uint32_t>(kept), each = static_cast<uint32_t>(entries);
    ProjectionKernel<T, kDual, kGradients>
        <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args, split, kept_entries, each);
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
