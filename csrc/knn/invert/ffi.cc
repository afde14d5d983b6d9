// Binds the grouping of pairs by point to XLA; see invert() in jax_knn_aggregate/ops/knn/aggregate.py.
//   operands  idxs (Q,K) int32
//   results   order (pairs,) int32   offsets (P+1,) int32   on CUDA also scratch (bytes,) uint8, without batch axes

#include "common/bind.h"
#include "knn/invert/cpu.h"
#ifdef KNN_CUDA
#include "knn/invert/cuda.h"
#endif

namespace knn {
namespace {

constexpr int64_t kTooMany = int64_t{1} << 31;  // for numbers in int32

Invert Read(Reader& in) {
  Invert v = {};
  v.batch = in.batch();
  const int64_t Q = in.Size(0, 0), K = in.Size(0, 1);
  v.row = Q * K;
  v.idxs = in.Arg<int32_t>({Q, K}).data;
  v.kept = in.RetBatch(0);
  v.pairs = v.row;
  for (int a = 0; a < v.batch.ndim; ++a) {
    if (v.kept.size[a] != v.batch.size[a]) v.pairs *= v.batch.size[a];
  }
  v.order = in.Ret<int32_t>(v.kept, {v.pairs});
  v.P = in.RetSize(1, 0) - 1;
  v.offsets = in.Ret<int32_t>(v.kept, {v.P + 1});
  // Python chooses the reference then, but cannot where jax.export left sizes open.
  if (v.pairs >= kTooMany || KNN_ISA::Count(v.kept) * (v.P + 1) >= kTooMany) {
    in.Fail("the grouping of pairs by point needs B*Q*K < 2^31 and B*(P+1) < 2^31");
  }
  return v;
}

ffi::Future Cpu(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, 2);
  const Invert invert = Read(in);
  return RunCpu(pool, in, KNN_BEST(InvertKernel()), invert);
}

XLA_FFI_DEFINE_HANDLER(kCpu, Cpu, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets());

#ifdef KNN_CUDA

ffi::Error Cuda(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, 2);
  const Invert invert = Read(in);
  const int64_t bytes = in.NextRetSize();
  void* scratch = in.Ret<uint8_t>(Batch{}, {bytes});
  return RunCuda(in, [&] { return LaunchInvert(invert, scratch, bytes, stream); });
}

KNN_CUDA_HANDLER(kCuda, Cuda,
                 ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets());

#endif  // KNN_CUDA

}  // namespace

std::vector<Registration> InvertRegistrations() {
  return {
      {"cpu", "invert", kCpu},
#ifdef KNN_CUDA
      {"cuda", "invert", kCuda},
#endif
  };
}

}  // namespace knn
