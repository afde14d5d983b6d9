// What the kernels of the multilayer perceptron take. T is the type of arithmetic, S that of all arrays.

#ifndef JKA_MLP_MLP_H_
#define JKA_MLP_MLP_H_

#include "common/input.h"

namespace knn {

// What lies beyond runs the reference. The widths that kernels take are up to each platform: on CPUs, XLA's matrix
// products are as fast from 512 on, but for the second order (a 2-core AVX2 machine: forward and backward take 0.9
// times as long at 128, 1.1 at 512 and 1.3 at 1024).
inline constexpr int kMaxLayers = 16, kMaxParts = 4, kMlpCpuMaxWidth = 512, kMlpCudaMaxWidth = 64;

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

// On CUDA a layer's sums over rows come in pieces of 16 of what it returns by 8 of what it takes, and behind them those
// of biases; so many blocks at most share in a sum.
inline constexpr int kMlpCudaPiece = 128, kMlpCudaPieces = 264;
inline int64_t MlpCudaSumCount(int64_t in, int64_t out) {
  return (out + 15) / 16 * ((in + 7) / 8 * kMlpCudaPiece + 16);
}
// What CUDA kernels want to write to behind gradients, whatever N is: `sum_entries` is the count of sum_batch where
// gradients in weights or biases are wanted, else 0; `bytes` those of a number that is computed with.
inline int64_t MlpCudaScratchBytes(const int64_t* width, int layers, int64_t bytes, int64_t sum_entries) {
  if (sum_entries == 0) return 0;
  int64_t count = 0;
  for (int l = 0; l < layers; ++l) count += MlpCudaSumCount(width[l], width[l + 1]);
  return count * bytes * (sum_entries > kMlpCudaPieces ? sum_entries : kMlpCudaPieces);
}

}  // namespace knn

#endif  // JKA_MLP_MLP_H_
