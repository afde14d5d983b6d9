// Binds the kernels of the aggregate op to XLA.
//   operands  q (Q,3)  p (P,3)  f (P,F)  sigma (P,3 or 1)  [R (P,3,3)]  idxs (Q,K)
//             then, where the bit masks in the attributes say so:
//             outs    cotangents of f_out (Q,F), w_out (Q,K), dists (Q,K)
//             along   tangents of q, p, f, sigma, [R]
//             along_ct  tangents of the cotangents
//             and, where a gradient of points is wanted, order (pairs,) and offsets (P+1,), see invert()
//   results   value, jvp: f_out (Q,F)  w_out (Q,K)  dists (Q,K), or their tangents
//             want_x   gradients in q, p, f, sigma, [R], vjp_jvp: their tangents; those of points with size 1 along
//                      summed batch axes
//             want_ct  gradients in the cotangents
//             and, where a gradient of points is wanted, scratch (Q,K,4), vjp_jvp: (Q,K,8), on CUDA also
//             (pieces,2,F+16)

#include "common/bind.h"
#include "knn/aggregate/cpu.h"
#ifdef KNN_CUDA
#include "knn/aggregate/cuda.h"
#endif

namespace knn {
namespace {

using Role = AggregateRole;

struct Masks {
  int64_t outs = 0, along = 0, along_ct = 0, want_x = 0, want_ct = 0;
};

template <class T, class TF>
Aggregate<T, TF> Read(Reader& in, MetricKind metric, Role role, const Masks& masks, bool cuda) {
  const bool aniso = metric == MetricKind::kAnisotropic;
  const int64_t parameters = aniso ? 3 : 1;
  const int num_x = aniso ? 5 : 4;

  Aggregate<T, TF> a = {};
  a.batch = in.batch();
  a.Q = in.Size(0, 0);
  a.P = in.Size(1, 0);
  a.F = in.Size(2, 1);
  a.K = in.Size(num_x, 1);
  a.stored = kStored<TF>;
  a.q = in.Arg<T>({a.Q, 3});
  a.p = in.Arg<T>({a.P, 3});
  a.f = in.Arg<TF>({a.P, a.F});
  a.sigma = in.Arg<T>({a.P, parameters});
  a.R = in.ArgIf<T>(aniso, {a.P, 3, 3});
  a.idxs = in.Arg<int32_t>({a.Q, a.K});

  a.ct_f = in.ArgIf<TF>(Bit(masks.outs, 0), {a.Q, a.F});
  a.ct_w = in.ArgIf<T>(Bit(masks.outs, 1), {a.Q, a.K});
  a.ct_d = in.ArgIf<T>(Bit(masks.outs, 2), {a.Q, a.K});

  a.v_q = in.ArgIf<T>(Bit(masks.along, 0), {a.Q, 3});
  a.v_p = in.ArgIf<T>(Bit(masks.along, 1), {a.P, 3});
  a.v_f = in.ArgIf<TF>(Bit(masks.along, 2), {a.P, a.F});
  a.v_sigma = in.ArgIf<T>(Bit(masks.along, 3), {a.P, parameters});
  a.v_R = in.ArgIf<T>(Bit(masks.along, 4), {a.P, 3, 3});

  if ((masks.along_ct & ~masks.outs) != 0) in.Fail("a cotangent that is zero has a tangent");
  a.v_ct_f = in.ArgIf<TF>(Bit(masks.along_ct, 0), {a.Q, a.F});
  a.v_ct_w = in.ArgIf<T>(Bit(masks.along_ct, 1), {a.Q, a.K});
  a.v_ct_d = in.ArgIf<T>(Bit(masks.along_ct, 2), {a.Q, a.K});

  const bool values = role == Role::kValue || role == Role::kJvp;
  const bool points = (masks.want_x >> 1) != 0;
  const int64_t want_y = values ? 7 : masks.want_ct;
  a.kept = points ? in.RetBatch(Bit(masks.want_x, 0) ? 1 : 0) : a.batch;
  int64_t pairs = a.Q * a.K;
  if (points) {
    for (int i = 0; i < a.batch.ndim; ++i) {
      if (a.kept.size[i] != a.batch.size[i]) pairs *= a.batch.size[i];
    }
    a.order = in.Arg<int32_t>({pairs});
    a.offsets = in.Arg<int32_t>({a.P + 1});
  }

  a.q_bar = in.RetIf<T>(Bit(masks.want_x, 0), a.batch, {a.Q, 3});
  a.p_bar = in.RetIf<T>(Bit(masks.want_x, 1), a.kept, {a.P, 3});
  a.f_bar = in.RetIf<TF>(Bit(masks.want_x, 2), a.kept, {a.P, a.F});
  a.sigma_bar = in.RetIf<T>(Bit(masks.want_x, 3), a.kept, {a.P, parameters});
  a.R_bar = in.RetIf<T>(Bit(masks.want_x, 4), a.kept, {a.P, 3, 3});
  a.f_out = in.RetIf<TF>(Bit(want_y, 0), a.batch, {a.Q, a.F});
  a.w_out = in.RetIf<T>(Bit(want_y, 1), a.batch, {a.Q, a.K});
  a.dists = in.RetIf<T>(Bit(want_y, 2), a.batch, {a.Q, a.K});
  const int64_t factors = role == Role::kVjpJvp ? sizeof(MovingFactors<T>) / sizeof(T) : 4;
  a.factors = reinterpret_cast<PairFactors<T>*>(in.RetIf<T>(points, a.batch, {a.Q, a.K, factors}));
  if (cuda) in.CheckCount(a.Q, "B*Q");
  const int64_t pieces = (pairs + kPiecePairs - 1) / kPiecePairs;
  a.pieces = in.RetIf<T>(points && cuda, a.kept, {pieces, 2, a.F + kPieceTerms});
  return a;
}

// Calls function(T(), TF()) for the types of the operands.
template <class Function>
auto WithTypes(Reader& in, Function&& function) {
  if (in.Type(0) == ffi::DataType::F64) return function(double(), double());
  if (in.Type(2) == ffi::DataType::BF16) return function(float(), BFloat16());
  if (in.Type(2) == ffi::DataType::F16) return function(float(), Half());
  return function(float(), float());
}

ffi::Future Cpu(ffi::ThreadPool& pool, ffi::RemainingArgs args, ffi::RemainingRets rets, MetricKind metric, Role role,
                Masks masks) {
  Reader in(args, rets, 2);
  return WithTypes(in, [&](auto t, auto tf) {
    using T = decltype(t);
    using TF = decltype(tf);
    const auto aggregate = Retyped<AnyHalf<TF>>(Read<T, TF>(in, metric, role, masks, /*cuda=*/false));
    return RunCpu(pool, in, KNN_BEST(AggregateKernel(metric, role, aggregate)), aggregate);
  });
}

#ifdef KNN_CUDA
ffi::Error Cuda(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets rets, MetricKind metric, Role role,
                Masks masks) {
  Reader in(args, rets, 2);
  return WithTypes(in, [&](auto t, auto tf) {
    using T = decltype(t);
    using TF = decltype(tf);
    const auto aggregate = Retyped<AnyHalf<TF>>(Read<T, TF>(in, metric, role, masks, /*cuda=*/true));
    return RunCuda(in, [&] { return LaunchAggregate(aggregate, metric, role, stream); });
  });
}
#endif

// A handler for each platform, metric and role. They differ in their attributes, which name their bit masks.
template <class Context, MetricKind metric, Role role>
struct Handler {
  static auto Run(Context& context, ffi::RemainingArgs args, ffi::RemainingRets rets, Masks masks) {
#ifdef KNN_CUDA
    if constexpr (std::is_same_v<Context, cudaStream_t>) {
      return Cuda(context, args, rets, metric, role, masks);
    } else  // NOLINT
#endif
      return Cpu(context, args, rets, metric, role, masks);
  }

  static auto Plain(Context context, ffi::RemainingArgs args, ffi::RemainingRets rets) {
    return Run(context, args, rets, {});
  }
  static auto Jvp(Context context, int64_t along, ffi::RemainingArgs args, ffi::RemainingRets rets) {
    return Run(context, args, rets, {0, along, 0, 0, 0});
  }
  static auto Vjp(Context context, int64_t outs, int64_t want_x, ffi::RemainingArgs args, ffi::RemainingRets rets) {
    return Run(context, args, rets, {outs, 0, 0, want_x, 0});
  }
  static auto VjpVjp(Context context, int64_t outs, int64_t along, int64_t want_x, int64_t want_ct,
                     ffi::RemainingArgs args, ffi::RemainingRets rets) {
    return Run(context, args, rets, {outs, along, 0, want_x, want_ct});
  }
  static auto VjpJvp(Context context, int64_t outs, int64_t along, int64_t along_ct, int64_t want_x,
                     ffi::RemainingArgs args, ffi::RemainingRets rets) {
    return Run(context, args, rets, {outs, along, along_ct, want_x, 0});
  }
};

template <class Context>
auto Bind() {
#ifdef KNN_CUDA
  if constexpr (std::is_same_v<Context, cudaStream_t>) {
    return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>();
  } else  // NOLINT
#endif
    return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>();
}

#define KNN_BIND_PLAIN(Context) Bind<Context>().RemainingArgs().RemainingRets()
#define KNN_BIND_JVP(Context) Bind<Context>().template Attr<int64_t>("along").RemainingArgs().RemainingRets()
#define KNN_BIND_VJP(Context) \
  Bind<Context>().Attr<int64_t>("outs").Attr<int64_t>("want_x").RemainingArgs().RemainingRets()
#define KNN_BIND_VJP_VJP(Context) \
  Bind<Context>()                 \
      .Attr<int64_t>("outs")      \
      .Attr<int64_t>("along")     \
      .Attr<int64_t>("want_x")    \
      .Attr<int64_t>("want_ct")   \
      .RemainingArgs()            \
      .RemainingRets()
#define KNN_BIND_VJP_JVP(Context) \
  Bind<Context>()                 \
      .Attr<int64_t>("outs")      \
      .Attr<int64_t>("along")     \
      .Attr<int64_t>("along_ct")  \
      .Attr<int64_t>("want_x")    \
      .RemainingArgs()            \
      .RemainingRets()

#define KNN_HANDLERS(DEFINE, platform, Context, Metric)                                                                \
  DEFINE(k##Metric##Value##platform, (Handler<Context, MetricKind::k##Metric, Role::kValue>::Plain),                   \
         KNN_BIND_PLAIN(Context));                                                                                     \
  DEFINE(k##Metric##Jvp##platform, (Handler<Context, MetricKind::k##Metric, Role::kJvp>::Jvp), KNN_BIND_JVP(Context)); \
  DEFINE(k##Metric##Vjp##platform, (Handler<Context, MetricKind::k##Metric, Role::kVjp>::Vjp), KNN_BIND_VJP(Context)); \
  DEFINE(k##Metric##VjpVjp##platform, (Handler<Context, MetricKind::k##Metric, Role::kVjpVjp>::VjpVjp),                \
         KNN_BIND_VJP_VJP(Context));                                                                                   \
  DEFINE(k##Metric##VjpJvp##platform, (Handler<Context, MetricKind::k##Metric, Role::kVjpJvp>::VjpJvp),                \
         KNN_BIND_VJP_JVP(Context))

KNN_HANDLERS(XLA_FFI_DEFINE_HANDLER, Cpu, ffi::ThreadPool, Anisotropic);
KNN_HANDLERS(XLA_FFI_DEFINE_HANDLER, Cpu, ffi::ThreadPool, Isotropic);
#ifdef KNN_CUDA
KNN_HANDLERS(KNN_CUDA_HANDLER, Cuda, cudaStream_t, Anisotropic);
KNN_HANDLERS(KNN_CUDA_HANDLER, Cuda, cudaStream_t, Isotropic);
#endif

}  // namespace

#define KNN_LIST(key, name, platform, Metric)                                                              \
  {key, name "_value", k##Metric##Value##platform}, {key, name "_jvp", k##Metric##Jvp##platform},          \
      {key, name "_vjp", k##Metric##Vjp##platform}, {key, name "_vjp_vjp", k##Metric##VjpVjp##platform}, { \
    key, name "_vjp_jvp", k##Metric##VjpJvp##platform                                                      \
  }

std::vector<Registration> AggregateRegistrations() {
  return {
      KNN_LIST("cpu", "aniso", Cpu, Anisotropic),
      KNN_LIST("cpu", "iso", Cpu, Isotropic),
#ifdef KNN_CUDA
      KNN_LIST("cuda", "aniso", Cuda, Anisotropic),
      KNN_LIST("cuda", "iso", Cuda, Isotropic),
#endif
  };
}

}  // namespace knn
