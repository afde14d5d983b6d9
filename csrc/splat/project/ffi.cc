// Binds the projection of Gaussians to XLA; see jax_knn_aggregate/ops/splat/project.py.
//   operands  means (P, 3), quats (P, 4), scales (P, 3) or, if `covariances`, these (P, 3, 3), opacities (P,), offset
//             (P, 2) if `offset`, colors (P, M, 3) unless `degree` is −1, camera (16,) or with colors (19,); usable ()
//             int32; then what `given` names: tangents of all but the last, cotangents of y, and tangents of these
//   results   those of the bit mask `want`: gradients in all that may have tangents; y, which is means2d (P, 2), conics
//             (P, 3), opacities (P,), channels (P, 4) or without colors (P,); depths (P,) float32, radii (P,) int32,
//             reach (P, 4) int32. Given tangents, the derivatives along them of all but the last three, which there are
//             beside y alone. On CUDA last scratch, where a gradient in the camera is wanted: (size of it, warps of P)

#include "common/bind.h"
#include "splat/project/cpu.h"
#ifdef KNN_CUDA
#include "splat/project/cuda.h"
#endif

namespace knn {
namespace {

struct Options {
  int32_t width, height, covariances, offset, degree, antialiased;
  double near, far, eps2d;
};

template <class T>
Projection<T> Read(Reader& in, int64_t given, int64_t want, const Options& options, bool cuda) {
  Projection<T> p = {};
  p.batch = p.kept = in.batch();
  p.P = in.Size(0, 0);
  p.M = 1;
  p.degree = options.degree;
  p.antialiased = options.antialiased != 0;
  p.screen = {options.width, options.height};
  p.near = static_cast<T>(options.near), p.far = static_cast<T>(options.far), p.eps2d = static_cast<T>(options.eps2d);
  if (options.width < 1 || options.height < 1) in.Fail("an image needs a pixel");
  if (options.degree < -1 || options.degree > 3) in.Fail("harmonics have a degree of 0 to 3");
  if (p.P >= int64_t{1} << 31) in.Fail("there are 2^31 Gaussians or more");

  // All that may move, in the order of operands, with what its gradient is written to.
  struct Member {
    Input<T>* input;
    T** bar;
    std::vector<int64_t> core;
  };
  std::vector<Member> x = {{&p.means, &p.means_bar, {p.P, 3}}};
  if (options.covariances != 0) {
    x.push_back({&p.covariances, &p.covariances_bar, {p.P, 3, 3}});
  } else {
    x.push_back({&p.quats, &p.quats_bar, {p.P, 4}});
    x.push_back({&p.scales, &p.scales_bar, {p.P, 3}});
  }
  x.push_back({&p.opacities, &p.opacities_bar, {p.P}});
  if (options.offset != 0) x.push_back({&p.offset, &p.offset_bar, {p.P, 2}});
  if (p.has_colors()) {
    const int64_t M = in.Size(x.size(), 1);
    if (M < (p.degree + 1) * (p.degree + 1) || M >= 1 << 20) in.Fail("colors lack harmonics, or have too many");
    p.M = static_cast<int>(M);
    x.push_back({&p.colors, &p.colors_bar, {p.P, M, 3}});
  }
  x.push_back({&p.camera, &p.camera_bar, {p.camera_size()}});
  const auto arg = [&](const std::vector<int64_t>& core) {
    return core.size() == 1   ? in.Arg<T>({core[0]})
           : core.size() == 2 ? in.Arg<T>({core[0], core[1]})
                              : in.Arg<T>({core[0], core[1], core[2]});
  };
  const auto ret = [&](const Batch& batch, const std::vector<int64_t>& core) {
    return core.size() == 1   ? in.Ret<T>(batch, {core[0]})
           : core.size() == 2 ? in.Ret<T>(batch, {core[0], core[1]})
                              : in.Ret<T>(batch, {core[0], core[1], core[2]});
  };
  for (const Member& m : x) m.input->value = arg(m.core);
  p.usable = in.Arg<int32_t>({});
  int bit = 0;
  for (const Member& m : x) {
    if (Bit(given, bit++)) m.input->tangent = arg(m.core);
  }
  const int channels = p.channel_count();
  Member y[] = {{&p.means2d_ct, &p.means2d, {p.P, 2}},
                {&p.conics_ct, &p.conics, {p.P, 3}},
                {&p.opacities_ct, &p.opacities_out, {p.P}},
                {&p.channels_ct, &p.channels, {p.P, channels}}};
  if (!p.has_colors()) y[3].core = {p.P};
  bool has_cotangent = false;
  for (const Member& m : y) {
    if (Bit(given, bit++)) m.input->value = arg(m.core), has_cotangent = true;
  }
  for (const Member& m : y) {
    if (Bit(given, bit++)) m.input->tangent = arg(m.core), has_cotangent = true;
  }
  const int64_t cotangents = int64_t{15} << x.size();
  p.dual = (given & ~cotangents) != 0;

  bit = 0;
  const int gaussians = static_cast<int>(x.size()) - 1;
  if ((want & ((int64_t{1} << gaussians) - 1)) != 0) p.kept = in.RetBatch(0);
  for (const Member& m : x) {
    const Batch& batch = bit < gaussians ? p.kept : p.batch;
    if (Bit(want, bit++)) *m.bar = ret(batch, m.core);
  }
  for (const Member& m : y) {
    if (Bit(want, bit++)) *m.bar = ret(p.batch, m.core);
  }
  const bool all = p.means2d != nullptr && p.conics != nullptr && p.opacities_out != nullptr && p.channels != nullptr;
  if (p.P > 0 && !all && (want >> x.size() & 15) != 0) in.Fail("the results of y come together");
  if (Bit(want, bit++)) p.depths = in.Ret<float>(p.batch, {p.P});
  if (Bit(want, bit++)) p.radii = in.Ret<int32_t>(p.batch, {p.P});
  if (Bit(want, bit++)) p.reach = in.Ret<int32_t>(p.batch, {p.P, 4});
  if ((p.depths == nullptr) != (p.radii == nullptr) || (p.reach != nullptr && p.radii == nullptr))
    in.Fail("depths, radii and reach come together");
  if (cuda && p.camera_bar != nullptr) p.camera_parts = in.Ret<T>(p.batch, {p.camera_size(), WarpsOf(p.P)});
  if (p.wants_gradients() && !has_cotangent) in.Fail("gradients need a cotangent");
  return p;
}

// Calls run(T()) with the type of the operands.
template <class Run>
auto WithType(const Reader& in, Run&& run) {
  return in.Type(0) == ffi::DataType::F64 ? run(double()) : run(float());
}

ffi::Future Cpu(ffi::ThreadPool pool, int64_t given, int64_t want, int32_t width, int32_t height, int32_t covariances,
                int32_t offset, int32_t degree, int32_t antialiased, double near, double far, double eps2d,
                ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  const Options options = {width, height, covariances, offset, degree, antialiased, near, far, eps2d};
  return WithType(in, [&](auto t) {
    const auto read = Read<decltype(t)>(in, given, want, options, /*cuda=*/false);
    return RunCpu(pool, in, KNN_BEST(ProjectionKernel(read)), read);
  });
}

#define KNN_SIZES Attr<int64_t>("given").Attr<int64_t>("want").Attr<int32_t>("width").Attr<int32_t>("height")
#define KNN_KINDS Attr<int32_t>("covariances").Attr<int32_t>("offset").Attr<int32_t>("degree")
#define KNN_LENS Attr<int32_t>("antialiased").Attr<double>("near").Attr<double>("far").Attr<double>("eps2d")
#define KNN_ATTRIBUTES KNN_SIZES.KNN_KINDS.KNN_LENS.RemainingArgs().RemainingRets()

XLA_FFI_DEFINE_HANDLER(kCpu, Cpu, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().KNN_ATTRIBUTES);

#ifdef KNN_CUDA

ffi::Error Cuda(cudaStream_t stream, int64_t given, int64_t want, int32_t width, int32_t height, int32_t covariances,
                int32_t offset, int32_t degree, int32_t antialiased, double near, double far, double eps2d,
                ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  const Options options = {width, height, covariances, offset, degree, antialiased, near, far, eps2d};
  return WithType(in, [&](auto t) {
    const auto read = Read<decltype(t)>(in, given, want, options, /*cuda=*/true);
    return RunCuda(in, [&] { return LaunchProjection(read, stream); });
  });
}

KNN_CUDA_HANDLER(kCuda, Cuda, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().KNN_ATTRIBUTES);

#endif  // KNN_CUDA

}  // namespace

std::vector<Registration> ProjectionRegistrations() {
  return {
      {"cpu", "splat_project", kCpu},
#ifdef KNN_CUDA
      {"cuda", "splat_project", kCuda},
#endif
  };
}

}  // namespace knn
