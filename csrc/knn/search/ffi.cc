// Binds the search kernels to XLA.
//   operands    q (Q,3)  p (P,3)  [sigma (P,3)  R (P,3,3)]  lengths ()
//               [index: leaves (leaves,rows,32)  order (leaves,32) int32  nodes (groups,11,32)], on CPUs always
//               [warm (Q,W) int32]
//   results     idxs (Q,K) int32   on CUDA also scratch (bytes,) uint8, without batch axes
//   attributes  indexed, warm int32: whether there are these operands

#include "common/bind.h"
#include "knn/search/cpu.h"
#ifdef KNN_CUDA
#include "knn/search/cuda.h"
#endif

namespace knn {
namespace {

template <class T>
Search<T> Read(Reader& in, MetricKind metric, bool indexed, bool warm) {
  const bool aniso = metric == MetricKind::kAnisotropic;
  Search<T> s = {};
  s.batch = in.batch();
  s.Q = in.Size(0, 0);
  s.P = in.Size(1, 0);
  s.q = in.Arg<T>({s.Q, 3});
  s.p = in.Arg<T>({s.P, 3});
  s.sigma = in.ArgIf<T>(aniso, {s.P, 3});
  s.R = in.ArgIf<T>(aniso, {s.P, 3, 3});
  s.lengths = in.Arg<int32_t>({});
  if (indexed) {
    const IndexShape shape = ShapeOfIndex(s.P);
    const int64_t rows = aniso ? kLeafRows<MetricKind::kAnisotropic> : kLeafRows<MetricKind::kIsotropic>;
    s.index.leaves = in.Arg<T>({shape.leaves, rows, kLeafSize});
    s.index.order = in.Arg<int32_t>({shape.leaves, kLeafSize});
    s.index.nodes = in.Arg<T>({shape.groups, kNodeRows, kFanOut});
  }
  if (warm) {
    s.W = in.NextSize(1);
    s.warm = in.Arg<int32_t>({s.Q, s.W});
  }
  s.K = in.RetSize(0, 1);
  s.idxs = in.Ret<int32_t>(s.batch, {s.Q, s.K});
  if (s.K < 1 || s.K > s.P) in.Fail("the search needs 1 <= K <= P");
  return s;
}

template <class T>
ffi::Future CpuOf(ffi::ThreadPool& pool, Reader& in, MetricKind metric, bool indexed, bool warm) {
  if (!indexed) in.Fail("the CPU search needs an index");
  const Search<T> args = Read<T>(in, metric, indexed, warm);
  return RunCpu(pool, in, KNN_BEST(SearchKernel<T>(metric)), args);
}

template <MetricKind metric>
ffi::Future Cpu(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t indexed, int32_t warm) {
  Reader in(args, rets, 2);
  return in.Type(0) == ffi::DataType::F64 ? CpuOf<double>(pool, in, metric, indexed != 0, warm != 0)
                                          : CpuOf<float>(pool, in, metric, indexed != 0, warm != 0);
}

template <class Binding>
auto WithAttributes(Binding binding) {
  return std::move(binding).template Attr<int32_t>("indexed").template Attr<int32_t>("warm");
}

auto CpuBinding() { return WithAttributes(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets()); }

XLA_FFI_DEFINE_HANDLER(kAnisotropicCpu, Cpu<MetricKind::kAnisotropic>, CpuBinding());
XLA_FFI_DEFINE_HANDLER(kIsotropicCpu, Cpu<MetricKind::kIsotropic>, CpuBinding());

#ifdef KNN_CUDA

template <class T>
ffi::Error CudaOf(cudaStream_t stream, Reader& in, MetricKind metric, bool indexed, bool warm) {
  const Search<T> args = Read<T>(in, metric, indexed, warm);
  const int64_t bytes = in.NextRetSize();
  void* scratch = in.Ret<uint8_t>(Batch{}, {bytes});
  in.CheckCount(args.Q, "B*Q");
  if (args.K > kCudaMaxK) in.Fail("the CUDA search needs K <= 256");
  return RunCuda(in, [&] { return LaunchSearch(args, metric, scratch, bytes, stream); });
}

template <MetricKind metric>
ffi::Error Cuda(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets, int32_t indexed, int32_t warm) {
  Reader in(args, rets, 2);
  return in.Type(0) == ffi::DataType::F64 ? CudaOf<double>(stream, in, metric, indexed != 0, warm != 0)
                                          : CudaOf<float>(stream, in, metric, indexed != 0, warm != 0);
}

auto CudaBinding() {
  return WithAttributes(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets());
}

KNN_CUDA_HANDLER(kAnisotropicCuda, Cuda<MetricKind::kAnisotropic>, CudaBinding());
KNN_CUDA_HANDLER(kIsotropicCuda, Cuda<MetricKind::kIsotropic>, CudaBinding());

#endif  // KNN_CUDA

}  // namespace

std::vector<Registration> SearchRegistrations() {
  return {
      {"cpu", "aniso_search", kAnisotropicCpu},
      {"cpu", "iso_search", kIsotropicCpu},
#ifdef KNN_CUDA
      {"cuda", "aniso_search", kAnisotropicCuda},
      {"cuda", "iso_search", kIsotropicCuda},
#endif
  };
}

}  // namespace knn
