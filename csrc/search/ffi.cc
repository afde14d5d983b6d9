// Binds the search kernels to XLA.
//   operands  q (Q,3)  p (P,3)  [sigma (P,3)  R (P,3,3)]  lengths ()
//   results   idxs (Q,K) int32

#include "common/bind.h"
#include "search/cpu.h"
#ifdef KNN_CUDA
#include "search/cuda.h"
#endif

namespace knn {
namespace {

template <class T>
Search<T> Read(Reader& in, MetricKind metric) {
  Search<T> s = {};
  s.batch = in.batch();
  s.Q = in.Size(0, 0);
  s.P = in.Size(1, 0);
  s.q = in.Arg<T>({s.Q, 3});
  s.p = in.Arg<T>({s.P, 3});
  if (metric == MetricKind::kAnisotropic) {
    s.sigma = in.Arg<T>({s.P, 3});
    s.R = in.Arg<T>({s.P, 3, 3});
  }
  s.lengths = in.Arg<int32_t>({});
  s.K = in.RetSize(0, 1);
  s.idxs = in.Ret<int32_t>(s.batch, {s.Q, s.K});
  if (s.K < 1 || s.K > s.P) in.Fail("the search needs 1 <= K <= P");
  return s;
}

template <class T>
CpuKernel<Search<T>> BestKernel(MetricKind metric) {
  switch (BestIsa()) {
#define KNN_CASE(isa) \
  case Isa::isa:      \
    return isa::SearchKernel<T>(metric);
    KNN_FOR_EACH_ISA(KNN_CASE)
#undef KNN_CASE
    default:
      return baseline::SearchKernel<T>(metric);
  }
}

template <class T>
ffi::Future CpuOf(ffi::ThreadPool& pool, Reader& in, MetricKind metric) {
  const Search<T> args = Read<T>(in, metric);
  return RunCpu(pool, in, BestKernel<T>(metric), args);
}

template <MetricKind metric>
ffi::Future Cpu(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, 2);
  return in.Type(0) == ffi::DataType::F64 ? CpuOf<double>(pool, in, metric) : CpuOf<float>(pool, in, metric);
}

auto CpuBinding() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets(); }

XLA_FFI_DEFINE_HANDLER(kAnisotropicCpu, Cpu<MetricKind::kAnisotropic>, CpuBinding());
XLA_FFI_DEFINE_HANDLER(kIsotropicCpu, Cpu<MetricKind::kIsotropic>, CpuBinding());

#ifdef KNN_CUDA

template <class T>
ffi::Error CudaOf(cudaStream_t stream, Reader& in, MetricKind metric) {
  const Search<T> args = Read<T>(in, metric);
  if (args.K > kCudaMaxK) in.Fail("the CUDA search needs K <= 256");
  return RunCuda(in, [&] { return LaunchSearch(args, metric, stream); });
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
