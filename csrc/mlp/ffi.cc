// Binds the kernels of the multilayer perceptron to XLA; jax_knn_aggregate/core/one_target.py says which operands and
// results there are.
//   operands    parts of x (N, width), then of each layer the weight (out, in), then biases (out,), if any; and those
//               that `given` names
//   attributes  parts; layers; biases, whether there are any; kinds and parameters of the activation and that of the
//               last layer; precision
//   results     those that `want` names, and on CUDA scratch (MlpCudaScratchBytes). Gradients in weights and biases are
//               all summed over the same batch axes

#include <cstring>
#include <type_traits>

#include "common/bind.h"
#include "mlp/cpu.h"
#ifdef KNN_CUDA
#include "mlp/cuda.h"
#endif

namespace knn {
namespace {

struct Layout {
  int32_t parts, layers, biases;
  ffi::Span<const int32_t> kinds;
  ffi::Span<const double> parameters;
  int32_t precision;
};

template <class T, class S>
Mlp<T, S> Read(Reader& in, int64_t given, int64_t want, const Layout& layout) {
  Mlp<T, S> m = {};
  m.batch = m.sum_batch = in.batch();
  m.N = in.Size(0, 0);
  m.parts = layout.parts;
  m.layers = layout.layers;
  m.precision = static_cast<ProductPrecision>(layout.precision);
  m.stored = kStored<S>;
  if (m.parts < 1 || m.parts > kMaxParts || m.layers < 1 || m.layers > kMaxLayers || layout.kinds.size() != 2 ||
      layout.parameters.size() != 2) {
    in.Fail("the attributes of the perceptron do not fit its kernels");
    m.parts = m.layers = 0;
    return m;
  }
  m.activation = {static_cast<ActivationKind>(layout.kinds[0]), layout.parameters[0]};
  m.output_activation = {static_cast<ActivationKind>(layout.kinds[1]), layout.parameters[1]};
  for (int i = 0; i < m.parts; ++i) m.width[0] += m.part_width[i] = static_cast<int>(in.Size(i, 1));
  for (int l = 0; l < m.layers; ++l) m.width[l + 1] = static_cast<int>(in.Size(m.parts + l, 0));

  // Calls read(input) for all that is differentiated in, in the order of operands and of masks.
  const auto each = [&](auto&& read) {
    for (int i = 0; i < m.parts; ++i) read(m.x[i], m.x_bar[i], {m.N, int64_t{m.part_width[i]}});
    for (int l = 0; l < m.layers; ++l) {
      read(m.weight[l], m.weight_bar[l], {int64_t{m.width[l + 1]}, int64_t{m.width[l]}});
    }
    if (!layout.biases) return;
    for (int l = 0; l < m.layers; ++l) read(m.bias[l], m.bias_bar[l], {int64_t{m.width[l + 1]}});
  };
  using Core = std::initializer_list<int64_t>;
  int count = 0;
  each([&](Input<S>& input, S*&, Core core) { input.value = in.Arg<S>(core), ++count; });
  int bit = 0;
  each([&](Input<S>& input, S*&, Core core) { input.tangent = in.ArgIf<S>(Bit(given, bit++), core); });
  const Core outputs = {m.N, int64_t{m.width[m.layers]}};
  m.ct.value = in.ArgIf<S>(Bit(given, bit), outputs);
  m.ct.tangent = in.ArgIf<S>(Bit(given, bit + 1), outputs);
  if ((want & ((int64_t{1} << count) - 1)) != 0 && !Bit(given, bit)) in.Fail("gradients need a cotangent");

  bit = 0;
  int result = 0;
  each([&](Input<S>&, S*& bar, Core core) {
    const bool sum = bit >= m.parts;
    if (Bit(want, bit)) {
      if (sum && !WantsSums(m)) m.sum_batch = in.RetBatch(result);
      bar = in.Ret<S>(sum ? m.sum_batch : m.batch, core);
      ++result;
    }
    ++bit;
  });
  m.y = in.RetIf<S>(Bit(want, count), m.batch, outputs);
  return m;
}

// Calls run(T(), S()) with the types of arithmetic and of arrays.
template <class Run>
auto WithTypes(const Reader& in, Run&& run) {
  if (in.Type(0) == ffi::DataType::F64) return run(double(), double());
  if (in.Type(0) == ffi::DataType::BF16) return run(float(), BFloat16());
  if (in.Type(0) == ffi::DataType::F16) return run(float(), Half());
  return run(float(), float());
}

ffi::Future Cpu(ffi::ThreadPool pool, int64_t given, int64_t want, int32_t parts, int32_t layers, int32_t biases,
                ffi::Span<const int32_t> kinds, ffi::Span<const double> parameters, int32_t precision,
                ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  return WithTypes(in, [&](auto t, auto s) {
    const auto mlp = Retyped<AnyHalf<decltype(s)>>(
        Read<decltype(t), decltype(s)>(in, given, want, {parts, layers, biases, kinds, parameters, precision}));
    return RunCpu(pool, in, KNN_BEST(MlpKernel(mlp)), mlp);
  });
}

#define KNN_ATTRIBUTES                             \
  Attr<int64_t>("given")                           \
      .Attr<int64_t>("want")                       \
      .Attr<int32_t>("parts")                      \
      .Attr<int32_t>("layers")                     \
      .Attr<int32_t>("biases")                     \
      .Attr<ffi::Span<const int32_t>>("kinds")     \
      .Attr<ffi::Span<const double>>("parameters") \
      .Attr<int32_t>("precision")                  \
      .RemainingArgs()                             \
      .RemainingRets()

XLA_FFI_DEFINE_HANDLER(kCpu, Cpu, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().KNN_ATTRIBUTES);

#ifdef KNN_CUDA

ffi::Error Cuda(cudaStream_t stream, int64_t given, int64_t want, int32_t parts, int32_t layers, int32_t biases,
                ffi::Span<const int32_t> kinds, ffi::Span<const double> parameters, int32_t precision,
                ffi::RemainingArgs args, ffi::RemainingRets rets) {
  Reader in(args, rets, /*first_core_ndim=*/2);
  return WithTypes(in, [&](auto t, auto s) {
    if constexpr (std::is_same_v<decltype(t), float>) {
      const auto read =
          Read<float, decltype(s)>(in, given, want, {parts, layers, biases, kinds, parameters, precision});
      const int64_t bytes = in.NextRetSize();
      uint8_t* scratch = in.RetIf<uint8_t>(WantsSums(read) || WantsRows(read), Batch{}, {bytes});
      return RunCuda(in, [&] { return LaunchMlp(Retyped<float>(read), scratch, bytes, stream); });
    } else {
      return ffi::Error::InvalidArgument("the perceptron has no CUDA kernels for float64");
    }
  });
}

KNN_CUDA_HANDLER(kCuda, Cuda, ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().KNN_ATTRIBUTES);

#endif  // KNN_CUDA

}  // namespace

std::vector<Registration> MlpRegistrations() {
  return {
      {"cpu", "mlp", kCpu},
#ifdef KNN_CUDA
      {"cuda", "mlp", kCuda},
#endif
  };
}

}  // namespace knn
