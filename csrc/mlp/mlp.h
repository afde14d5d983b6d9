// What the kernels of the multilayer perceptron take. T is the type of arithmetic, S that of all arrays.

#ifndef JKA_MLP_MLP_H_
#define JKA_MLP_MLP_H_

#include "common/input.h"

namespace knn {

// What lies beyond runs the reference. The widths that kernels take are up to each platform: on CPUs, XLA's matrix
// products are as fast from 512 on, but for the second order (a 2-core AVX2 machine: forward and backward take 0.9
// times as long at 128, 1.1 at 512 and 1.3 at 1024).
inline constexpr int kMaxLayers = 16, kMaxParts = 4, kMlpCpuMaxWidth = 512, kMlpCudaMaxWidth = 128;

// In the order of `KINDS` of ops/mlp/kernels.py.
enum class ActivationKind : int32_t {
  none,
  relu,
  leaky_relu,
  softplus,
  sine,
  silu,
  tanh,
  sigmoid,
  exponential,
  squareplus,
  gelu,
  gelu_exact
};
struct Activation {
  ActivationKind kind;
  double parameter;  // slope, beta or omega; of the others 0
};

// Of products in float on CUDA, as jax.lax.Precision has them: default may use TF32, highest is as exact as float.
enum class ProductPrecision : int32_t { fast, high, highest };

// One struct serves the value and all derivatives. Operands that are not given, and results that are not asked for, are
// null. Sizes after the batch axes stand behind each array; x and its gradient come in parts, side by side.
template <class T, class S>
struct Mlp {
  Batch batch;
  int64_t N;  // rows of a batch entry
  int parts, layers;
  int part_width[kMaxParts];  // 0 too
  int width[kMaxLayers + 1];  // of all of x, then of what each layer returns: 1 or more
  Activation activation, output_activation;
  ProductPrecision precision;
  Stored stored;  // all arrays

  Input<S> x[kMaxParts];        // [N, part_width]
  Input<S> weight[kMaxLayers];  // [width[l + 1], width[l]]
  Input<S> bias[kMaxLayers];    // [width[l + 1]], or no values at all
  Input<S> ct;                  // [N, width[layers]], where gradients are wanted

  // Given tangents, the derivatives of these along them.
  S* y;                 // [N, width[layers]], in full batch
  S* x_bar[kMaxParts];  // [N, part_width], in full batch
  // Shaped like weight and bias, summed over rows and over the axes along which sum_batch has size 1.
  S* weight_bar[kMaxLayers];
  S* bias_bar[kMaxLayers];
  Batch sum_batch;
};

template <class T, class S>
KNN_FN bool HasTangents(const Mlp<T, S>& a) {
  bool any = a.ct.tangent.data != nullptr;
  for (int i = 0; i < a.parts; ++i) any |= a.x[i].tangent.data != nullptr;
  for (int l = 0; l < a.layers; ++l) any |= a.weight[l].tangent.data != nullptr || a.bias[l].tangent.data != nullptr;
  return any;
}

// Whether the gradient in any weight or bias is wanted; in any part of x.
template <class T, class S>
KNN_FN bool WantsSums(const Mlp<T, S>& a) {
  bool any = false;
  for (int l = 0; l < a.layers; ++l) any |= a.weight_bar[l] != nullptr || a.bias_bar[l] != nullptr;
  return any;
}
template <class T, class S>
KNN_FN bool WantsRows(const Mlp<T, S>& a) {
  bool any = false;
  for (int i = 0; i < a.parts; ++i) any |= a.x_bar[i] != nullptr;
  return any;
}

// Weights and biases of all layers.
inline int64_t ParameterCount(const int64_t* width, int layers) {
  int64_t count = 0;
  for (int l = 0; l < layers; ++l) count += width[l + 1] * (width[l] + 1);
  return count;
}

// Blocks that a sum is shared by on CUDA, divided by the count of sums, and no more than are resident at a time; and
// blocks that keep layers of a tile of kMlpCudaKeptRows in scratch, where they are too large for shared memory.
inline constexpr int kMlpCudaPieces = 264, kMlpCudaKeeping = 144, kMlpCudaKeptRows = 32;

// What CUDA kernels may keep of layer l for a tile, of what it takes and of σ', with `bytes` for each number that is
// computed with; and of all layers, or 0 if shared memory has room for these.
KNN_FN int64_t MlpCudaKeptBytes(int64_t width, int l, int64_t bytes) {
  return (l == 0 ? 1 : 2) * kMlpCudaKeptRows * ((width + 63) / 64 * 64) * bytes;
}
template <class W>
int64_t MlpCudaKeptBytes(const W* width, int layers, int64_t bytes) {
  int64_t kept = 0;
  for (int l = 0; l < layers; ++l) kept += MlpCudaKeptBytes(width[l], l, bytes);
  return kept > (int64_t{1} << 16) ? kept : 0;
}

// What CUDA kernels want to write to behind gradients, whatever N is: `sum_entries` is the count of sum_batch where
// gradients in weights or biases are wanted, else 0. What is kept follows the sums.
inline int64_t MlpCudaSumBytes(int64_t pieces, int64_t parameters, int64_t bytes) {
  return (pieces * parameters * bytes + 127) / 128 * 128;
}
inline int64_t MlpCudaScratchBytes(const int64_t* width, int layers, int64_t bytes, int64_t sum_entries) {
  const int64_t pieces = sum_entries > kMlpCudaPieces ? sum_entries : kMlpCudaPieces;
  const int64_t keeping = sum_entries > kMlpCudaKeeping ? sum_entries : kMlpCudaKeeping;
  return (sum_entries == 0 ? 0 : MlpCudaSumBytes(pieces, ParameterCount(width, layers), bytes)) +
         keeping * MlpCudaKeptBytes(width, layers, bytes);
}

}  // namespace knn

#endif  // JKA_MLP_MLP_H_
