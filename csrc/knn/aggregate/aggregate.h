// What the kernels of the aggregate op take. T is the arithmetic type, TF that of features.

#ifndef JKA_KNN_AGGREGATE_AGGREGATE_H_
#define JKA_KNN_AGGREGATE_AGGREGATE_H_

#include "common/batch.h"
#include "knn/aggregate/formulas.h"

namespace knn {

enum class AggregateRole { kValue, kJvp, kVjp, kVjpVjp, kVjpJvp };

// One struct serves all roles. Operands and results that a role does not have, or that are not asked for, are null.
// Sizes after the batch axes stand behind each array. Results in full batch are dense.
template <class T, class TF>
struct Aggregate {
  Batch batch;
  int64_t Q, P, F, K;
  Stored stored;  // features

  Operand<const T> q;           // [Q, 3]
  Operand<const T> p;           // [P, 3]
  Operand<const TF> f;          // [P, F]
  Operand<const T> sigma;       // [P, kSigma]
  Operand<const T> R;           // [P, 3, 3]; anisotropic only
  Operand<const int32_t> idxs;  // [Q, K]; outside [0, P) means no neighbour

  // Cotangents of the results; null means zero.
  Operand<const TF> ct_f;  // [Q, F]
  Operand<const T> ct_w;   // [Q, K]
  Operand<const T> ct_d;   // [Q, K]

  // Tangents of q, p, f, sigma, R; null means zero.
  Operand<const T> v_q, v_p;
  Operand<const TF> v_f;
  Operand<const T> v_sigma, v_R;

  // vjp_jvp: tangents of ct_f, ct_w, ct_d; null means zero, and is where the cotangent is.
  Operand<const TF> v_ct_f;
  Operand<const T> v_ct_w, v_ct_d;

  // value: f_out, w_out, dists. jvp: their tangents. vjp_vjp: the cotangents of ct_f, ct_w, ct_d, which are the same
  // thing. In full batch.
  TF* f_out;  // [Q, F]
  T* w_out;   // [Q, K]
  T* dists;   // [Q, K]

  T* q_bar;  // [Q, 3], in full batch

  // Gradients of points. `kept` is the batch shape of these results: 1 along axes that they sum over.
  Batch kept;
  T* p_bar;
  TF* f_bar;
  T* sigma_bar;
  T* R_bar;

  // Pairs (query, slot) grouped by point, see invert(); needed for gradients of points.
  Operand<const int32_t> order;    // [pairs of a group]
  Operand<const int32_t> offsets;  // [P + 1]
  PairFactors<T>* factors;         // [Q, K], in full batch; scratch. vjp_jvp: MovingFactors<T>
  T* pieces;                       // [pairs of a group / kPiecePairs, 2, F + kPieceTerms]; scratch, on CUDA alone
};

// Scratch of the CUDA kernel: the grouped pairs are cut into pieces of as many, and each leaves up to two points' sums.
inline constexpr int64_t kPiecePairs = 64, kPieceTerms = 16;

// Not whether there is scratch: without queries that has no elements, and may be null.
template <class T, class TF>
KNN_FN bool WantsPoints(const Aggregate<T, TF>& a) {
  return a.p_bar != nullptr || a.f_bar != nullptr || a.sigma_bar != nullptr || a.R_bar != nullptr;
}

}  // namespace knn

#endif  // JKA_KNN_AGGREGATE_AGGREGATE_H_
