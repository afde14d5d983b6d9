// Binds the kernels of the Gaussian rasterizer to XLA.
//   splat_tiles     operands means, conics, opacities, depths, reach if `reach`; results order, offsets, owners, slots,
//   ends splat_forward   operands x, lists, reach if `reach`, then tangents of x that `given` names;
//                   results image, alpha, through (1 or 2, height, width), last
//   splat_backward  operands as those of splat_forward, then through, last, and cotangents of image and alpha and
//   tangents
//                   of these that `given` names (bits 5 to 8); results gradients in x that `want` names
// with x = means, conics, opacities, channels, background.

#include "common/bind.h"
#include "splat/cpu.h"
#ifdef KNN_CUDA
#include "splat/cuda.h"
#endif

namespace knn {
namespace {

constexpr int kX = 5;

bool CheckScreen(Reader& in, int32_t width, int32_t height) {
  if (width < 1 || height < 1 || width > 1 << 20 || height > 1 << 20) {
    in.Fail("the image is " + std::to_string(width) + " by " + std::to_string(height) + ", expected 1 to 2^20 each");
    return false;
  }
  return true;
}

int64_t TilesOf(int32_t width, int32_t height) {
  return int64_t{(width + kTile - 1) / kTile} * ((height + kTile - 1) / kTile);
}

// A result in full batch, of one core axis.
Operand<int32_t> Numbers(Reader& in, int64_t size) {
  Operand<int32_t> operand = {in.Ret<int32_t>(in.batch(), {size}), {}};
  int64_t stride = size;
  for (int a = in.batch().ndim - 1; a >= 0; stride *= in.batch().size[a--]) operand.stride[a] = stride;
  return operand;
}

template <class T>
Tiles<T> ReadTiles(Reader& in, int32_t width, int32_t height, bool reach) {
  Tiles<T> t = {};
  t.batch = in.batch();
  t.P = in.Size(0, 0);
  t.capacity = in.RetSize(2, 0);
  t.screen = {width, height};
  if (!CheckScreen(in, width, height)) return t;
  if (t.P >= int64_t{1} << 31) in.Fail("there are 2^31 Gaussians or more");
  t.means = in.Arg<T>({t.P, 2});
  t.conics = in.Arg<T>({t.P, 3});
  t.opacities = in.Arg<T>({t.P});
  t.depths = in.Arg<float>({t.P});
  t.reach = in.ArgIf<int32_t>(reach, {t.P, 4});
  t.lists = {Numbers(in, t.P), Numbers(in, t.P + 1), Numbers(in, t.capacity), Numbers(in, t.capacity),
             Numbers(in, TilesOf(width, height))};
  return t;
}

// What forward and backward have in common.
template <class T>
Splat<T> ReadSplat(Reader& in, int64_t given, int32_t width, int32_t height, bool reach) {
  Splat<T> s = {};
  s.batch = in.batch();
  s.P = in.Size(0, 0);
  s.channel_count = static_cast<int>(in.Size(3, 1));
  s.capacity = in.Size(kX + 2, 0);
  s.screen = {width, height};
  if (!CheckScreen(in, width, height)) return s;
  Input<T>* x[kX] = {&s.means, &s.conics, &s.opacities, &s.channels, &s.background};
  const auto read = [&](int i) -> Operand<const T> {
    switch (i) {
      case 0:
        return in.Arg<T>({s.P, 2});
      case 1:
        return in.Arg<T>({s.P, 3});
      case 2:
        return in.Arg<T>({s.P});
      case 3:
        return in.Arg<T>({s.P, s.channel_count});
      default:
        return in.Arg<T>({s.channel_count});
    }
  };
  for (int i = 0; i < kX; ++i) x[i]->value = read(i);
  const auto list = [&](int64_t size) { return in.Arg<int32_t>({size}); };
  s.lists = {list(s.P), list(s.P + 1), list(s.capacity), list(s.capacity), list(TilesOf(width, height))};
  s.reach = in.ArgIf<int32_t>(reach, {s.P, 4});
  for (int i = 0; i < kX; ++i) {
    if (Bit(given, i)) x[i]->tangent = read(i);
  }
  s.dual = (given & ~(int64_t{3} << kX)) != 0;
  return s;
}

template <class T>
Splat<T> ReadForward(Reader& in, int64_t given, int32_t width, int32_t height, bool reach) {
  Splat<T> s = ReadSplat<T>(in, given, width, height, reach);
  s.image = in.Ret<T>(s.batch, {height, width, s.channel_count});
  s.alpha = in.Ret<T>(s.batch, {height, width});
  s.through_out = in.Ret<T>(s.batch, {s.dual ? 2 : 1, height, width});
  s.last_out = in.Ret<int32_t>(s.batch, {height, width});
  return s;
}

template <class T>
Splat<T> ReadBackward(Reader& in, int64_t given, int64_t want, int32_t width, int32_t height, bool reach) {
  Splat<T> s = ReadSplat<T>(in, given, width, height, reach);
  s.through = in.Arg<T>({s.dual ? 2 : 1, height, width});
  s.last = in.Arg<int32_t>({height, width});
  s.image_ct.value = in.ArgIf<T>(Bit(given, kX), {height, width, s.channel_count});
  s.alpha_ct.value = in.ArgIf<T>(Bit(given, kX + 1), {height, width});
  s.image_ct.tangent = in.ArgIf<T>(Bit(given, kX + 2), {height, width, s.channel_count});
  s.alpha_ct.tangent = in.ArgIf<T>(Bit(given, kX + 3), {height, width});
  s.means_bar = in.RetIf<T>(Bit(want, 0), s.batch, {s.P, 2});
  s.conics_bar = in.RetIf<T>(Bit(want, 1), s.batch, {s.P, 3});
  s.opacities_bar = in.RetIf<T>(Bit(want, 2), s.batch, {s.P});
  s.channels_bar = in.RetIf<T>(Bit(want, 3), s.batch, {s.P, s.channel_count});
  s.background_bar = in.RetIf<T>(Bit(want, 4), s.batch, {s.channel_count});
  if ((given >> kX) == 0) in.Fail("gradients need a cotangent");
  return s;
}

// Calls run(T()) with the type of the operands.
template <class Run>
auto WithType(const Reader& in, Run&& run) {
  return in.Type(0) == ffi::DataType::F64 ? run(double()) : run(float());
}

ffi::Future TilesCpu(ffi::ThreadPool pool, int32_t width, int32_t height, int32_t reach, ffi::RemainingArgs args,
                     ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  return WithType(in, [&](auto t) {
    using T = decltype(t);
    const auto read = ReadTiles<T>(in, width, height, reach != 0);
    return RunCpu(pool, in, KNN_BEST(TilesKernel<T>()), read);
  });
}

ffi::Future ForwardCpu(ffi::ThreadPool pool, int32_t width, int32_t height, int32_t reach, int64_t given,
                       ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  return WithType(in, [&](auto t) {
    const auto read = ReadForward<decltype(t)>(in, given, width, height, reach != 0);
    return RunCpu(pool, in, KNN_BEST(SplatForwardKernel(read)), read);
  });
}

ffi::Future BackwardCpu(ffi::ThreadPool pool, int32_t width, int32_t height, int32_t reach, int64_t given, int64_t want,
                        ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  return WithType(in, [&](auto t) {
    const auto read = ReadBackward<decltype(t)>(in, given, want, width, height, reach != 0);
    return RunCpu(pool, in, KNN_BEST(SplatBackwardKernel(read)), read);
  });
}

#define KNN_SCREEN Attr<int32_t>("width").Attr<int32_t>("height").Attr<int32_t>("reach")
#define KNN_TILES KNN_SCREEN.RemainingArgs().RemainingRets()
#define KNN_FORWARD KNN_SCREEN.Attr<int64_t>("given").RemainingArgs().RemainingRets()
#define KNN_BACKWARD KNN_SCREEN.Attr<int64_t>("given").Attr<int64_t>("want").RemainingArgs().RemainingRets()

XLA_FFI_DEFINE_HANDLER(kTilesCpu, TilesCpu, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().KNN_TILES);
XLA_FFI_DEFINE_HANDLER(kForwardCpu, ForwardCpu, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().KNN_FORWARD);
XLA_FFI_DEFINE_HANDLER(kBackwardCpu, BackwardCpu, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().KNN_BACKWARD);

#ifdef KNN_CUDA

// Of the scratch behind all results.
struct Scratch {
  int64_t bytes;
  uint8_t* data;
  explicit Scratch(Reader& in) : bytes(in.NextRetSize()), data(in.Ret<uint8_t>(Batch{}, {bytes})) {}
};

ffi::Error TilesCuda(cudaStream_t stream, int32_t width, int32_t height, int32_t reach, ffi::RemainingArgs args,
                     ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  return WithType(in, [&](auto t) {
    const auto read = ReadTiles<decltype(t)>(in, width, height, reach != 0);
    const Scratch scratch(in);
    return RunCuda(in, [&] { return LaunchTiles(read, scratch.data, scratch.bytes, stream); });
  });
}

ffi::Error ForwardCuda(cudaStream_t stream, int32_t width, int32_t height, int32_t reach, int64_t given,
                       ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  return WithType(in, [&](auto t) {
    const auto read = ReadForward<decltype(t)>(in, given, width, height, reach != 0);
    return RunCuda(in, [&] { return LaunchSplatForward(read, stream); });
  });
}

ffi::Error BackwardCuda(cudaStream_t stream, int32_t width, int32_t height, int32_t reach, int64_t given, int64_t want,
                        ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  return WithType(in, [&](auto t) {
    const auto read = ReadBackward<decltype(t)>(in, given, want, width, height, reach != 0);
    const Scratch scratch(in);
    return RunCuda(in, [&] { return LaunchSplatBackward(read, scratch.data, scratch.bytes, stream); });
  });
}

KNN_CUDA_HANDLER(kTilesCuda, TilesCuda, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().KNN_TILES);
KNN_CUDA_HANDLER(kForwardCuda, ForwardCuda, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().KNN_FORWARD);
KNN_CUDA_HANDLER(kBackwardCuda, BackwardCuda, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().KNN_BACKWARD);

#endif  // KNN_CUDA

}  // namespace

std::vector<Registration> SplatRegistrations() {
  return {
      {"cpu", "splat_tiles", kTilesCpu},         {"cpu", "splat_forward", kForwardCpu},
      {"cpu", "splat_backward", kBackwardCpu},
#ifdef KNN_CUDA
      {"cuda", "splat_tiles", kTilesCuda},       {"cuda", "splat_forward", kForwardCuda},
      {"cuda", "splat_backward", kBackwardCuda},
#endif
  };
}

}  // namespace knn
