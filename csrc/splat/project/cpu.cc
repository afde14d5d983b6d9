// Projection on CPUs: a vector of Gaussians at a time, whose rows are transposed on their way in and out.

#include "splat/project/cpu.h"

#include <algorithm>
#include <type_traits>

#include "common/simd_math.h"
#include "splat/project/formulas.h"

namespace knn::KNN_ISA {

template <class T>
KNN_FN Vec<T> InversePower(Vec<T> x) {
  using Bits = decltype(x.v < x.v);
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr int kMantissa = kFloat ? 23 : 52, kMost = kFloat ? 254 : 2046;
  const Bits power = kMost - ((Bits)x.v >> kMantissa & (kMost + 1));
  const Bits normal = power < 1 ? power - power + 1 : power;
  return {(typename Vec<T>::Native)(normal << kMantissa)};
}

namespace {

constexpr int64_t kGaussiansOfTask = 512;

// Some rows of an array (…, columns), `stride` numbers apart, at most as many as there are lanes; into out, column
// after column. Lanes without a row get the last one.
template <class T>
void LoadRows(const T* a, int64_t stride, int rows, int columns, T* out) {
  constexpr int kLanes = Vec<T>::kLanes;
  int column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    Vec<T> block[kLanes];
    for (int l = 0; l < kLanes; ++l) block[l] = Vec<T>::Load(a + std::min(l, rows - 1) * stride + column);
    Transpose(block);
    for (int k = 0; k < kLanes; ++k) block[k].Store(out + (column + k) * kLanes);
  }
  for (; column < columns; ++column) {
    for (int l = 0; l < kLanes; ++l) out[column * kLanes + l] = a[std::min(l, rows - 1) * stride + column];
  }
}

// The other way.
template <class T>
void StoreRows(const T* in, int64_t stride, int rows, int columns, T* a) {
  constexpr int kLanes = Vec<T>::kLanes;
  int column = 0;
  for (; column + kLanes <= columns; column += kLanes) {
    Vec<T> block[kLanes];
    for (int k = 0; k < kLanes; ++k) block[k] = Vec<T>::Load(in + (column + k) * kLanes);
    Transpose(block);
    for (int l = 0; l < rows; ++l) block[l].Store(a + l * stride + column);
  }
  for (; column < columns; ++column) {
    for (int l = 0; l < rows; ++l) a[l * stride + column] = in[column * kLanes + l];
  }
}

template <class T, bool kDual>
struct Projector {
  using Args = Projection<T>;
  using V = Vec<T>;
  using N = std::conditional_t<kDual, Dual<V>, V>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kMostColumns = 3 * kMostHarmonics;

  // Some rows of an operand and its tangent, as vectors by column.
  template <int n>
  struct Columns {
    alignas(64) T value[n * kLanes], tangent[n * kLanes];
    KNN_FN N operator[](int k) const {
      if constexpr (kDual) {
        return {V::Load(value + k * kLanes), V::Load(tangent + k * kLanes)};
      } else {
        return V::Load(value + k * kLanes);
      }
    }
  };

  // Which of the Gaussians of a batch entry are looked at.
  struct Some {
    const Batch& batch;
    int64_t b, first;
    int rows;
  };

  template <int n>
  static void Read(const Input<T>& input, const Some& some, int columns, int64_t stride, Columns<n>& out) {
    const auto read = [&](const Operand<const T>& operand, T* to) {
      const T* a = AtOrNull(operand, some.batch, some.b);
      if (a == nullptr) return std::fill_n(to, columns * kLanes, T(0)), void();
      LoadRows(a + some.first * stride, stride, some.rows, columns, to);
    };
    read(input.value, out.value);
    if (kDual) read(input.tangent, out.tangent);
  }
  template <int n>
  static void Read(const Input<T>& input, const Some& some, Columns<n>& out) {
    Read(input, some, n, n, out);
  }

  // n numbers of each Gaussian.
  template <int n>
  static void Write(const V (&x)[n], int64_t first, int rows, T* a) {
    if (a == nullptr) return;
    alignas(64) T columns[n * kLanes];
    for (int k = 0; k < n; ++k) x[k].Store(columns + k * kLanes);
    StoreRows(columns, n, rows, n, a + first * n);
  }

  // Sums over batch entries of what the results are to be.
  struct Bars {
    V mean[3], quat[4], scale[3], covariance[9], opacity[1], offset[2];
    V color[kMostColumns];
  };

  static int64_t Chunks(const Args& args) { return CeilDiv(args.P, kGaussiansOfTask); }
  static int64_t Tasks(const Args& args) { return Count(args.kept) * Chunks(args); }
  static int64_t CameraTasks(const Args& args) { return args.camera_bar == nullptr ? 0 : Count(args.batch); }
  static int64_t ScratchBytes(const Args& args) {
    return CameraTasks(args) * Chunks(args) * args.camera_size() * int64_t{sizeof(V)};
  }
  // Sums of a chunk, for each number of the camera a vector.
  static T* CameraSums(const Args& args, void* scratch, int64_t b, int64_t chunk) {
    return static_cast<T*>(scratch) + (b * Chunks(args) + chunk) * args.camera_size() * kLanes;
  }

  static void Run(const Args& args, void* scratch, int64_t task) {
    const int64_t c = task / Chunks(args), chunk = task % Chunks(args);
    const SplitBatch split = Split(args.batch, args.kept);
    const int64_t entries = Count(args.batch) / Count(args.kept);
    const int64_t begin = chunk * kGaussiansOfTask, end = Min(begin + kGaussiansOfTask, args.P);
    const auto entry = [&](int64_t s) { return Join(split, static_cast<uint32_t>(c), static_cast<uint32_t>(s)); };
    for (int64_t s = 0; args.camera_bar != nullptr && s < entries; ++s) {
      std::fill_n(CameraSums(args, scratch, entry(s), chunk), args.camera_size() * kLanes, T(0));
    }
    for (int64_t first = begin; first < end; first += kLanes) {
      const int rows = static_cast<int>(Min(kLanes, end - first));
      Bars bars = {};
      for (int64_t s = 0; s < entries; ++s) {
        const Some some = {args.batch, entry(s), first, rows};
        One(args, some, args.camera_bar == nullptr ? nullptr : CameraSums(args, scratch, some.b, chunk), bars);
      }
      const int64_t at = c * args.P + first;
      Write(bars.mean, at, rows, args.means_bar);
      Write(bars.quat, at, rows, args.quats_bar);
      Write(bars.scale, at, rows, args.scales_bar);
      Write(bars.covariance, at, rows, args.covariances_bar);
      Write(bars.opacity, at, rows, args.opacities_bar);
      Write(bars.offset, at, rows, args.offset_bar);
      if (args.colors_bar != nullptr) WriteColors(args, bars.color, at, rows);
    }
  }

  static void WriteColors(const Args& args, const V (&bar)[kMostColumns], int64_t first, int rows) {
    alignas(64) T columns[kMostColumns * kLanes];
    const int used = 3 * (args.degree + 1) * (args.degree + 1);
    for (int k = 0; k < used; ++k) bar[k].Store(columns + k * kLanes);
    T* const a = args.colors_bar + first * 3 * args.M;
    StoreRows(columns, 3 * args.M, rows, used, a);
    for (int l = 0; l < rows; ++l) std::fill(a + l * 3 * args.M + used, a + (l + 1) * 3 * args.M, T(0));
  }

  static KNN_FN Camera<N> CameraOf(const Args& args, int64_t b) {
    const T *camera = At(args.camera.value, args.batch, b), *moves = AtOrNull(args.camera.tangent, args.batch, b);
    const auto at = [&](int i) {
      if constexpr (kDual) {
        return N{V::Broadcast(camera[i]), V::Broadcast(moves == nullptr ? 0 : moves[i])};
      } else {
        return V::Broadcast(camera[i]);
      }
    };
    return Camera<N>(at, args.screen, args.camera_size());
  }

  static KNN_FN Point<N> PointOf(const Columns<3>& a) { return {a[0], a[1], a[2]}; }

  // Writes y, adds gradients to bars and camera_sums.
  static void One(const Args& args, const Some& some, T* camera_sums, Bars& bars) {
    const Camera<N> camera = CameraOf(args, some.b);
    const bool matrices = args.covariances.value.data != nullptr;
    Columns<3> means, scales;
    Columns<4> quats;
    Columns<9> matrix;
    Columns<1> opacities;
    Columns<2> offset;
    Read(args.means, some, means);
    Read(args.opacities, some, opacities);
    const Point<N> mean = PointOf(means);
    const N opacity = opacities[0];

    View<N> view;
    Locate(camera, mean, view);
    Ellipsoid<N> ellipsoid;
    Symmetric<N> symmetric;
    if (matrices) {
      Read(args.covariances, some, matrix);
      symmetric = SymmetricPart<N>(
          {matrix[0], matrix[1], matrix[2], matrix[3], matrix[4], matrix[5], matrix[6], matrix[7], matrix[8]});
      view.bare = SeenAlong(symmetric, view.a, view.b, view.w);
    } else {
      Read(args.quats, some, quats);
      Read(args.scales, some, scales);
      ellipsoid = EllipsoidOf<N>({quats[0], quats[1], quats[2], quats[3]}, PointOf(scales));
      view.bare = SeenAlong(ellipsoid, view.a, view.b, view.w);
    }
    Flatten(args.eps2d, args.antialiased, view);
    if (args.offset.value.data != nullptr) {
      Read(args.offset, some, offset);
      view.u = view.u + offset[0], view.v = view.v + offset[1];
    }
    const bool usable = *At(args.usable, args.batch, some.b) != 0;
    auto drawn = IsSeen(usable ? args.near : Precision<T>::kMost, args.far, view, opacity);

    const V one = V::Broadcast(1);
    const bool any = LessEqualMask(one, Select(drawn, one, V{})) != 0;

    Sight<N> sight;
    Columns<kMostColumns> sh;
    N harmonics[kMostHarmonics], color[3] = {};
    if (any && args.has_colors()) {
      Read(args.colors, some, 3 * (args.degree + 1) * (args.degree + 1), 3 * args.M, sh);
      sight = SightOf(mean, camera.centre);
      Harmonics(args.degree, sight.direction, harmonics);
      Colors(args.degree, harmonics, [&](int i) { return sh[i]; }, color);
      V sum = {};
      for (const N& part : color) sum = sum + (ValueOf(part) - ValueOf(part));
      drawn = drawn & IsZero(sum);
    }
    const auto shown = [&](N x) { return Select(drawn, Result(x), V{}); };

    const int64_t at = some.b * args.P + some.first;
    if (args.means2d != nullptr) {
      Write<2>({shown(view.u), shown(view.v)}, at, some.rows, args.means2d);
      Write<3>({shown(view.conic[0]), shown(view.conic[1]), shown(view.conic[2])}, at, some.rows, args.conics);
      Write<1>({shown(opacity * view.factor)}, at, some.rows, args.opacities_out);
      if (args.has_colors()) {
        const auto clamped = [&](N x) { return shown(Select(Greater(ValueOf(x), V{}), x, N{})); };
        Write<4>({clamped(color[0]), clamped(color[1]), clamped(color[2]), shown(view.position.z)}, at, some.rows,
                 args.channels);
      } else {
        Write<1>({shown(view.position.z)}, at, some.rows, args.channels);
      }
    }
    if constexpr (!kDual) {
      if (args.depths != nullptr) WriteReach(args, view, Select(drawn, one, V{}), at, some.rows);
    }
    if (any && args.wants_gradients()) {
      Pull(args, some, camera, mean, quats, ellipsoid, symmetric, opacity, view, drawn, sight, sh, harmonics, color,
           camera_sums, bars);
    }
  }

  template <class Drawn>
  static void Pull(const Args& args, const Some& some, const Camera<N>& camera, const Point<N>& mean,
                   const Columns<4>& quats, const Ellipsoid<N>& ellipsoid, const Symmetric<N>& symmetric,
                   const N& opacity, const View<N>& view, Drawn drawn, const Sight<N>& sight,
                   const Columns<kMostColumns>& sh, const N (&harmonics)[kMostHarmonics], const N (&color)[3],
                   T* camera_sums, Bars& bars) {
    const auto add = [&](V& sum, N bar) { sum = sum + Select(drawn, Result(bar), V{}); };
    Columns<2> means2d_ct;
    Columns<3> conics_ct;
    Columns<1> opacities_ct;
    Columns<4> channels_ct;
    Read(args.means2d_ct, some, means2d_ct);
    Read(args.conics_ct, some, conics_ct);
    Read(args.opacities_ct, some, opacities_ct);
    const int channels = args.channel_count();
    Read(args.channels_ct, some, channels, channels, channels_ct);
    const ViewCotangent<N> ct = {means2d_ct[0],
                                 means2d_ct[1],
                                 {conics_ct[0], conics_ct[1], conics_ct[2]},
                                 opacities_ct[0],
                                 channels_ct[channels - 1]};
    ViewBar<N> bar = {};
    if (args.has_colors()) {
      N color_bar[3];
      for (int c = 0; c < 3; ++c) color_bar[c] = Select(Greater(ValueOf(color[c]), V{}), channels_ct[c], N{});
      const Point<N> of_mean = PullColors(args.degree, sight, [&](int i) { return sh[i]; }, color_bar);
      bar.centre = Point<N>{} - of_mean;
      if (args.colors_bar != nullptr) {
        ForHarmonics(args.degree, [&](int m) {
          for (int c = 0; c < 3; ++c) add(bars.color[3 * m + c], harmonics[m] * color_bar[c]);
        });
      }
    }
    const Ellipse<N> bare_bar = PullFlatten(args.eps2d, args.antialiased, camera, view, opacity, ct, bar);
    AlongBar<N> along;
    if (args.covariances.value.data != nullptr) {
      Symmetric<N> matrix_bar;
      along = PullSeenAlong(symmetric, view.a, view.b, view.w, bare_bar, matrix_bar);
      const Symmetric<N>& m = matrix_bar;
      const N entries[9] = {m.xx, m.xy, m.xz, m.xy, m.yy, m.yz, m.xz, m.yz, m.zz};
      for (int k = 0; k < 9; ++k) add(bars.covariance[k], entries[k]);
    } else {
      Ellipsoid<N> e_bar;
      along = PullSeenAlong(ellipsoid, view.a, view.b, view.w, bare_bar, e_bar);
      for (int k = 0; k < 3; ++k) add(bars.scale[k], e_bar.scale[k]);
      if (args.quats_bar != nullptr) {
        const Quaternion<N> q = PullAxes<N>({quats[0], quats[1], quats[2], quats[3]}, e_bar.axis);
        add(bars.quat[0], q.w), add(bars.quat[1], q.x), add(bars.quat[2], q.y), add(bars.quat[3], q.z);
      }
    }
    PullLocate(camera, view, ct, along, bar);
    const Point<N> mean_bar = PullMean(camera, bar);
    add(bars.mean[0], mean_bar.x), add(bars.mean[1], mean_bar.y), add(bars.mean[2], mean_bar.z);
    add(bars.opacity[0], bar.opacity);
    add(bars.offset[0], ct.u), add(bars.offset[1], ct.v);
    if (camera_sums == nullptr) return;
    // The last rows stand for lanes that have none.
    const V lane = V::Ramp(), there = Select(lane.v < static_cast<T>(some.rows), V::Broadcast(1), V{});
    PullCamera(mean, view, ct, bar, args.camera_size(), [&](int i, N g) {
      const V part = Select(drawn & (there.v > 0), Result(g), V{});
      (V::Load(camera_sums + i * kLanes) + part).Store(camera_sums + i * kLanes);
    });
  }

  static void WriteReach(const Args& args, const View<V>& view, V drawn, int64_t first, int rows) {
    for (int l = 0; l < rows; ++l) {
      const int64_t i = first + l;
      int32_t reach[4] = {}, radius = 0;
      if (drawn.v[l] != 0) {
        radius = ReachOf(args.screen, T(view.u.v[l]), T(view.v.v[l]), T(view.xx.v[l]), T(view.ellipse.xy.v[l]),
                         T(view.yy.v[l]), reach);
      }
      args.depths[i] = drawn.v[l] != 0 ? static_cast<float>(view.position.z.v[l]) : 0;
      args.radii[i] = radius;
      if (args.reach != nullptr) std::copy_n(reach, 4, args.reach + 4 * i);
    }
  }

  static void SumCamera(const Args& args, void* scratch, int64_t b) {
    const int size = args.camera_size();
    double sums[kCameraSizeWithCentre] = {};
    for (int64_t chunk = 0; chunk < Chunks(args); ++chunk) {
      const T* parts = CameraSums(args, scratch, b, chunk);
      for (int k = 0; k < size; ++k) sums[k] += Sum(V::Load(parts + k * kLanes));
    }
    for (int k = 0; k < size; ++k) args.camera_bar[b * size + k] = static_cast<T>(sums[k]);
  }

  static constexpr CpuKernel<Args> kKernel = {&ScratchBytes, {{&Tasks, &Run}, {&CameraTasks, &SumCamera}, {}}};
};

}  // namespace

template <class T>
CpuKernel<Projection<T>> ProjectionKernel(const Projection<T>& args) {
  return args.dual ? Projector<T, true>::kKernel : Projector<T, false>::kKernel;
}
template CpuKernel<Projection<float>> ProjectionKernel(const Projection<float>&);
template CpuKernel<Projection<double>> ProjectionKernel(const Projection<double>&);

}  // namespace knn::KNN_ISA
