// Binds the kernels of the hash grid to XLA; jax_knn_aggregate/core/one_target.py says which operands and results there
// are.
//   operands    x (N, dim)  table (rows, features)  weights (levels,), and those that `given` names
//   attributes  of the grid: features, interpolation; of each level: scales, strides (dim of each), hashed, and
//               level_rows, where its rows begin, with the number of all behind

#include <cmath>

#include "common/bind.h"
#include "hash_grid/cpu.h"
#ifdef KNN_CUDA
#include "hash_grid/cuda.h"
#endif

namespace knn {
namespace {

struct Layout {
  int32_t features, interpolation;
  ffi::Span<const float> scales;
  ffi::Span<const int64_t> level_rows, strides;
  ffi::Span<const int32_t> hashed;
};

template <class T, class S>
HashGrid<T, S> Read(Reader& in, int64_t given, int64_t want, const Layout& layout) {
  HashGrid<T, S> g = {};
  const int64_t levels = static_cast<int64_t>(layout.scales.size());
  g.batch = in.batch();
  g.N = in.Size(0, 0);
  g.dim = static_cast<int>(in.Size(0, 1));
  g.levels = static_cast<int>(levels);
  g.features = layout.features;
  g.stored = kStored<S>;
  g.interpolation = static_cast<Interpolation>(layout.interpolation);
  if (g.dim < 2 || g.dim > kMaxDim || levels < 1 || levels > kMaxGridLevels ||
      static_cast<int64_t>(layout.strides.size()) != levels * g.dim ||
      static_cast<int64_t>(layout.level_rows.size()) != levels + 1 ||
      static_cast<int64_t>(layout.hashed.size()) != levels) {
    in.Fail("the attributes of the hash grid do not fit each other");
    return g;
  }
  g.rows = static_cast<uint32_t>(layout.level_rows[levels]);
  for (int l = 0; l < levels; ++l) {
    Level& level = g.level[l];
    level.scale = layout.scales[l];
    level.first = static_cast<uint32_t>(layout.level_rows[l]);
    level.rows = static_cast<uint32_t>(layout.level_rows[l + 1]) - level.first;
    for (int d = 0; d < g.dim; ++d) level.stride[d] = static_cast<uint32_t>(layout.strides[l * g.dim + d]);
    level.hashed = layout.hashed[l] != 0;
    g.most_scale = std::fmax(g.most_scale, std::fabs(level.scale));
  }
  const int64_t outputs = levels * g.features;
  g.x.value = in.Arg<T>({g.N, g.dim});
  g.table.value = in.Arg<S>({g.rows, g.features});
  g.weights = in.Arg<T>({levels});
  g.x.tangent = in.ArgIf<T>(Bit(given, 0), {g.N, g.dim});
  g.table.tangent = in.ArgIf<S>(Bit(given, 1), {g.rows, g.features});
  g.ct.value = in.ArgIf<S>(Bit(given, 2), {g.N, outputs});
  g.ct.tangent = in.ArgIf<S>(Bit(given, 3), {g.N, outputs});
  g.x_bar = in.RetIf<T>(Bit(want, 0), g.batch, {g.N, g.dim});
  g.table_batch = Bit(want, 1) ? in.RetBatch(Bit(want, 0)) : g.batch;
  g.table_bar = in.RetIf<S>(Bit(want, 1), g.table_batch, {g.rows, g.features});
  g.y = in.RetIf<S>(Bit(want, 2), g.batch, {g.N, outputs});
  if ((want & 3) != 0 && !Bit(given, 2)) in.Fail("gradients need a cotangent");
  return g;
}

// Calls run(T(), S()) with the types of positions and table.
template <class Run>
auto WithTypes(const Reader& in, Run&& run) {
  if (in.Type(0) == ffi::DataType::F64) return run(double(), double());
  if (in.Type(1) == ffi::DataType::BF16) return run(float(), BFloat16());
  if (in.Type(1) == ffi::DataType::F16) return run(float(), Half());
  return run(float(), float());
}

ffi::Future Cpu(ffi::ThreadPool pool, int64_t given, int64_t want, int32_t features, int32_t interpolation,
                ffi::Span<const float> scales, ffi::Span<const int64_t> level_rows, ffi::Span<const int64_t> strides,
                ffi::Span<const int32_t> hashed, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  return WithTypes(in, [&](auto t, auto s) {
    const auto grid = Retyped<AnyHalf<decltype(s)>>(Read<decltype(t), decltype(s)>(
        in, given, want, {features, interpolation, scales, level_rows, strides, hashed}));
    return RunCpu(pool, in, KNN_BEST(HashGridKernel(grid)), grid);
  });
}

#define KNN_ATTRIBUTES                              \
  Attr<int64_t>("given")                            \
      .Attr<int64_t>("want")                        \
      .Attr<int32_t>("features")                    \
      .Attr<int32_t>("interpolation")               \
      .Attr<ffi::Span<const float>>("scales")       \
      .Attr<ffi::Span<const int64_t>>("level_rows") \
      .Attr<ffi::Span<const int64_t>>("strides")    \
      .Attr<ffi::Span<const int32_t>>("hashed")     \
      .RemainingArgs()                              \
      .RemainingRets()

XLA_FFI_DEFINE_HANDLER(kCpu, Cpu, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().KNN_ATTRIBUTES);

#ifdef KNN_CUDA

ffi::Error Cuda(cudaStream_t stream, int64_t given, int64_t want, int32_t features, int32_t interpolation,
                ffi::Span<const float> scales, ffi::Span<const int64_t> level_rows, ffi::Span<const int64_t> strides,
                ffi::Span<const int32_t> hashed, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  return WithTypes(in, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    const auto read = Read<T, S>(in, given, want, {features, interpolation, scales, level_rows, strides, hashed});
    in.CheckCount(read.N * features, "batch * N * features");
    const int64_t groups = KNN_ISA::CeilDiv(read.levels, KNN_ISA::LevelsOfThread(read.features));
    T* parts =
        in.RetIf<T>(Bit(want, 0) && groups > 1, Batch{}, {groups, KNN_ISA::Count(read.batch) * read.N, read.dim});
    const int64_t bytes = in.NextRetSize();
    uint8_t* scratch = in.RetIf<uint8_t>(Bit(want, 1), Batch{}, {bytes});
    return RunCuda(in, [&] { return LaunchHashGrid(Retyped<T>(read), parts, scratch, bytes, stream); });
  });
}

KNN_CUDA_HANDLER(kCuda, Cuda, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().KNN_ATTRIBUTES);

#endif  // KNN_CUDA

}  // namespace

std::vector<Registration> HashGridRegistrations() {
  return {
      {"cpu", "hash_grid", kCpu},
#ifdef KNN_CUDA
      {"cuda", "hash_grid", kCuda},
#endif
  };
}

}  // namespace knn
