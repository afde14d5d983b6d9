// Binds the kernels of the distortion loss to XLA; see jax_knn_aggregate/ops/distortion/kernels.py.
//   operands  w (N,)  m (N,)  interval (N,) or (1,)  [offsets (R+1,) int32]
//             then, where the bit mask `given` says so, tangents of w, m, interval, and the cotangent of the loss, ()
//             or (R,), and its tangent; see core/one_target.py
//   results   those of the bit mask `want`: gradients in w (N,), m (N,) and interval (N,), or (1,) or (R,) where it is
//             shared; then the loss, () or (R,). Given tangents, the derivatives of all these along them. On CUDA last
//             scratch, where a gradient in w or m is wanted: (whole tiles of 512 bytes that N samples have, 8)

#include "common/bind.h"
#include "distortion/cpu.h"
#ifdef KNN_CUDA
#include "distortion/cuda.h"
#endif

namespace knn {
namespace {

// Samples have numbers in int32. Python checks that as well, but cannot where jax.export left sizes open.
void CheckSamples(Reader& in, int64_t N) {
  if (N >= int64_t{1} << 31) in.Fail("a ray, or the flat arrays of rays, need fewer than 2^31 samples");
}

template <class T>
Distortion<T> Read(Reader& in, bool flat, int64_t given, int64_t want, bool shared_interval) {
  Distortion<T> a = {};
  a.batch = in.batch();
  a.N = in.Size(0, 0);
  a.R = flat ? in.Size(3, 0) - 1 : 1;
  const int64_t width = shared_interval ? 1 : a.N;
  a.shared_interval = shared_interval;
  CheckSamples(in, a.N);
  a.w = in.Arg<T>({a.N});
  a.m = in.Arg<T>({a.N});
  a.interval = in.Arg<T>({width});
  a.offsets = in.ArgIf<int32_t>(flat, {a.R + 1});
  a.v_w = in.ArgIf<T>(Bit(given, 0), {a.N});
  a.v_m = in.ArgIf<T>(Bit(given, 1), {a.N});
  a.v_interval = in.ArgIf<T>(Bit(given, 2), {width});

  // Without the ray axis, a ray's number is a scalar.
  const auto read_rays = [&] { return flat ? in.Arg<T>({a.R}) : in.Arg<T>({}); };
  if (Bit(given, 3)) a.ct = read_rays();
  if (Bit(given, 4)) a.v_ct = read_rays();
  a.w_bar = in.RetIf<T>(Bit(want, 0), a.batch, {a.N});
  a.m_bar = in.RetIf<T>(Bit(want, 1), a.batch, {a.N});
  a.interval_bar = in.RetIf<T>(Bit(want, 2), a.batch, {a.shared_interval ? a.R : a.N});
  if (Bit(want, 3)) a.loss = flat ? in.Ret<T>(a.batch, {a.R}) : in.Ret<T>(a.batch, {});
  const int64_t along = given & ~8;  // tangents
  if ((want & 7) != 0 && !Bit(given, 3)) in.Fail("gradients need a cotangent");
  if (along == 0 && want > 8) in.Fail("without tangents, a call gives the loss or gradients");
  if (along == 16) in.Fail("a tangent of the cotangent alone is a cotangent");
  if (along == 1 && want == 1) {  // linear; see formulas.h
    a.w = a.v_w;
    a.v_w = {};
  }
  return a;
}

RayOffsets Read(Reader& in) {
  RayOffsets a = {};
  a.batch = in.batch();
  a.N = in.Size(0, 0);
  a.R = in.RetSize(0, 0) - 1;
  CheckSamples(in, a.N);
  a.ray_id = in.Arg<int32_t>({a.N});
  a.offsets = in.Ret<int32_t>(a.batch, {a.R + 1});
  return a;
}

template <bool flat>
ffi::Future Cpu(ffi::ThreadPool pool, int64_t given, int64_t want, int32_t shared_interval, ffi::RemainingArgs args,
                ffi::RemainingRets rets) {
  Reader in(args, rets, 1);
  const auto run = [&](auto t) {
    const auto distortion = Read<decltype(t)>(in, flat, given, want, shared_interval != 0);
    return RunCpu(pool, in, KNN_BEST(DistortionKernel(distortion)), distortion);
  };
  return in.Type(0) == ffi::DataType::F64 ? run(double()) : run(float());
}

ffi::Future OffsetsCpu(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, 1);
  const RayOffsets offsets = Read(in);
  return RunCpu(pool, in, baseline::RayOffsetsKernel(), offsets);
}

#define KNN_ATTRIBUTES \
  Attr<int64_t>("given").Attr<int64_t>("want").Attr<int32_t>("shared_interval").RemainingArgs().RemainingRets()

XLA_FFI_DEFINE_HANDLER(kDenseCpu, Cpu<false>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().KNN_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER(kFlatCpu, Cpu<true>, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().KNN_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER(kOffsetsCpu, OffsetsCpu,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets());

#ifdef KNN_CUDA

template <bool flat>
ffi::Error Cuda(cudaStream_t stream, int64_t given, int64_t want, int32_t shared_interval, ffi::RemainingArgs args,
                ffi::RemainingRets rets) {
  Reader in(args, rets, 1);
  const auto run = [&](auto t) {
    auto distortion = Read<decltype(t)>(in, flat, given, want, shared_interval != 0);
    distortion.right_sums =
        in.RetIf<decltype(t)>((want & 3) != 0, distortion.batch, {WholeTiles(distortion), kRightSums});
    return RunCuda(in, [&] { return LaunchDistortion(distortion, stream); });
  };
  return in.Type(0) == ffi::DataType::F64 ? run(double()) : run(float());
}

ffi::Error OffsetsCuda(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, 1);
  const RayOffsets offsets = Read(in);
  return RunCuda(in, [&] { return LaunchRayOffsets(offsets, stream); });
}

KNN_CUDA_HANDLER(kDenseCuda, Cuda<false>, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().KNN_ATTRIBUTES);
KNN_CUDA_HANDLER(kFlatCuda, Cuda<true>, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().KNN_ATTRIBUTES);
KNN_CUDA_HANDLER(kOffsetsCuda, OffsetsCuda,
                 ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets());

#endif  // KNN_CUDA

}  // namespace

std::vector<Registration> DistortionRegistrations() {
  return {
      {"cpu", "distortion", kDenseCpu},   {"cpu", "flat_distortion", kFlatCpu},   {"cpu", "ray_offsets", kOffsetsCpu},
#ifdef KNN_CUDA
      {"cuda", "distortion", kDenseCuda}, {"cuda", "flat_distortion", kFlatCuda}, {"cuda", "ray_offsets", kOffsetsCuda},
#endif
  };
}

}  // namespace knn
