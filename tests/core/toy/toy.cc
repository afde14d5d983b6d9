// Binds the toy's kernel to XLA; core/one_target.py says which operands and results there are.
//   operands  a ()  x (N,)  table (T,)  k (N,) int32, and those that `given` names

#include "toy.h"

#include "common/bind.h"

namespace knn::KNN_ISA {

template <class T>
Toy<T> Read(Reader& in, int64_t given, int64_t want) {
  const int64_t N = in.Size(1, 0), entries = in.Size(2, 0);
  Toy<T> t = {};
  t.batch = in.batch(), t.N = N, t.entries = entries;
  t.a.value = in.Arg<T>({});
  t.x.value = in.Arg<T>({N});
  t.table.value = in.Arg<T>({entries});
  t.k = in.Arg<int32_t>({N});
  t.a.tangent = in.ArgIf<T>(Bit(given, 0), {});
  t.x.tangent = in.ArgIf<T>(Bit(given, 1), {N});
  t.table.tangent = in.ArgIf<T>(Bit(given, 2), {entries});
  t.ct.value = in.ArgIf<T>(Bit(given, 3), {N});
  t.ct.tangent = in.ArgIf<T>(Bit(given, 4), {N});
  t.a_bar = in.RetIf<T>(Bit(want, 0), t.batch, {});
  t.x_bar = in.RetIf<T>(Bit(want, 1), t.batch, {N});
  t.table_bar = in.RetIf<T>(Bit(want, 2), t.batch, {entries});
  t.y = in.RetIf<T>(Bit(want, 3), t.batch, {N});
  if ((want & 7) != 0 && !Bit(given, 3)) in.Fail("gradients need a cotangent");
  return t;
}

ffi::Future Cpu(ffi::ThreadPool pool, int64_t given, int64_t want, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/0);
  const auto run = [&](auto zero) {
    return RunCpu(pool, in, ToyKernel<decltype(zero)>((given & ~8) != 0), Read<decltype(zero)>(in, given, want));
  };
  return in.Type(0) == ffi::DataType::F64 ? run(0.0) : run(0.0f);
}

#define TOY_ATTRIBUTES Attr<int64_t>("given").Attr<int64_t>("want").RemainingArgs().RemainingRets()
XLA_FFI_DEFINE_HANDLER_SYMBOL(ToyCpu, Cpu, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().TOY_ATTRIBUTES);

}  // namespace knn::KNN_ISA
