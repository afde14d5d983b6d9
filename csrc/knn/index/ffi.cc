// Binds the index builder to XLA; see build() in jax_knn_aggregate/ops/knn/index.py.
//   operands  p (P,3)  [sigma (P,3)  R (P,3,3)]  lengths ()
//   results   leaves (leaves,rows,32)  order (leaves,32) int32  nodes (groups,11,32)
//             on CUDA also scratch (bytes,) uint8, without batch axes
//   attributes  on CPUs, plain int32: whether to leave points as they come and to rule nothing out

#include "common/bind.h"
#include "knn/index/cpu.h"
#ifdef KNN_CUDA
#include "knn/index/cuda.h"
#endif

namespace knn {
namespace {

template <class T>
BuildIndex<T> Read(Reader& in, MetricKind metric) {
  const bool aniso = metric == MetricKind::kAnisotropic;
  BuildIndex<T> x = {};
  x.batch = in.batch();
  x.P = in.Size(0, 0);
  x.p = in.Arg<T>({x.P, 3});
  x.sigma = in.ArgIf<T>(aniso, {x.P, 3});
  x.R = in.ArgIf<T>(aniso, {x.P, 3, 3});
  x.lengths = in.Arg<int32_t>({});
  const IndexShape shape = ShapeOfIndex(x.P);
  const int64_t rows = aniso ? kLeafRows<MetricKind::kAnisotropic> : kLeafRows<MetricKind::kIsotropic>;
  x.leaves = in.Ret<T>(x.batch, {shape.leaves, rows, kLeafSize});
  x.order = in.Ret<int32_t>(x.batch, {shape.leaves, kLeafSize});
  x.nodes = in.Ret<T>(x.batch, {shape.groups, kNodeRows, kFanOut});
  return x;
}

template <class T>
ffi::Future CpuOf(ffi::ThreadPool& pool, Reader& in, MetricKind metric, bool plain) {
  BuildIndex<T> args = Read<T>(in, metric);
  args.plain = plain;
  return RunCpu(pool, in, KNN_BEST(BuildIndexKernel<T>(metric)), args);
}

template <MetricKind metric>
ffi::Future Cpu(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t plain) {
  Reader in(args, rets, 2);
  return in.Type(0) == ffi::DataType::F64 ? CpuOf<double>(pool, in, metric, plain != 0)
                                          : CpuOf<float>(pool, in, metric, plain != 0);
}

auto CpuBinding() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int32_t>("plain");
}

XLA_FFI_DEFINE_HANDLER(kAnisotropicCpu, Cpu<MetricKind::kAnisotropic>, CpuBinding());
XLA_FFI_DEFINE_HANDLER(kIsotropicCpu, Cpu<MetricKind::kIsotropic>, CpuBinding());

#ifdef KNN_CUDA

template <class T>
ffi::Error CudaOf(cudaStream_t stream, Reader& in, MetricKind metric) {
  const BuildIndex<T> args = Read<T>(in, metric);
  const int64_t bytes = in.NextRetSize();
  void* scratch = in.Ret<uint8_t>(Batch{}, {bytes});
  in.CheckCount(args.P, "B*P");
  return RunCuda(in, [&] { return LaunchBuildIndex(args, metric, scratch, bytes, stream); });
}

template <MetricKind metric>
ffi::Error Cuda(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, 2);
  return in.Type(0) == ffi::DataType::F64 ? CudaOf<double>(stream, in, metric) : CudaOf<float>(stream, in, metric);
}

auto CudaBinding() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets(); }

KNN_CUDA_HANDLER(kAnisotropicCuda, Cuda<MetricKind::kAnisotropic>, CudaBinding());
KNN_CUDA_HANDLER(kIsotropicCuda, Cuda<MetricKind::kIsotropic>, CudaBinding());

#endif  // KNN_CUDA

}  // namespace

std::vector<Registration> IndexRegistrations() {
  return {
      {"cpu", "aniso_index", kAnisotropicCpu},
      {"cpu", "iso_index", kIsotropicCpu},
#ifdef KNN_CUDA
      {"cuda", "aniso_index", kAnisotropicCuda},
      {"cuda", "iso_index", kIsotropicCuda},
#endif
  };
}

}  // namespace knn
