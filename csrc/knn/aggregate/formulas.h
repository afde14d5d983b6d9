// What one pair (query, neighbour) adds to the results of the aggregate op, to second order.
//
// Over the K neighbours of a query, with D, e, s_D, s_e of metric.h and w = exp(−e):
//
//   f_out = Σ_k w f      w_out = w      dists = D
//
// First order. For cotangents (g, γ, δ) of (f_out, w_out, dists) let L = ⟨g, f_out⟩ + Σ_k (γ w + δ D). With b = ⟨g, f⟩,
// A = b + γ, and dw/de = −w, a pair adds
//
//   f̄ += w g      and through the metric the gradient of  δ D − w A e  with the factors held fixed.
//
// Forward mode. With ẇ = −w s_e:      ḟ_out = Σ_k w (ḟ − s_e f)      ẇ_out = −w s_e      Ḋ = s_D.
//
// Second order. The scalar to differentiate is S = ⟨(g, γ, δ), J v⟩ with v the tangent; with a = ⟨g, ḟ⟩ a pair adds
//
//   S = w (a − A s_e) + δ s_D.
//
// In the cotangents:  ḡ = Σ_k w (ḟ − s_e f)   γ̄ = −w s_e   δ̄ = s_D      (J v: the same as forward mode)
// In the features:    f̄ += −w s_e g
// In the rest, through the metric, the gradient of  −w (a − A s_e) e + δ s_D − w A s_e  with the factors held fixed.
//
// Forward over reverse. Hessians are symmetric: along v, gradients of L change by those of S. Where the cotangents move
// too, along (ġ, γ̇, δ̇), a is all of Ȧ = ⟨g, ḟ⟩ + ⟨ġ, f⟩ + γ̇, and a pair also adds
//
//   f̄ += w ġ      and through the metric the gradient of  δ̇ D.
//
// A neighbour at distance +inf (an overflow, or an infinite coordinate) is an empty slot: weight 0, whatever sigma·inf
// is, nothing in f_out, whatever its feature is, and at every order derivative 0, where the products above would be
// 0·inf. Such a pair's factor of g is −0, which no other's is.

#ifndef JKA_KNN_AGGREGATE_FORMULAS_H_
#define JKA_KNN_AGGREGATE_FORMULAS_H_

#include <type_traits>

#include "knn/metric.h"

namespace knn {

// What the half of a kernel that owns queries finds out about a pair, for the half that owns points: the factor of g in
// f̄, and the factors of the metric's terms (first order: of D and e; second order: of e, s_D, s_e).
template <class T>
struct alignas(4 * sizeof(T)) PairFactors {
  T feature;
  T a_e;
  T dist, exponent;
};

// Where cotangents move too: also the factors of ġ and of D.
template <class T>
struct MovingFactors : PairFactors<T> {
  T moving_feature;
  T a_dist;
};
template <class T, bool kMoving>
using FactorsOf = std::conditional_t<kMoving, MovingFactors<T>, PairFactors<T>>;

}  // namespace knn

namespace knn::KNN_ISA {

// The factors of a pair that adds nothing, whatever they would be multiplied with.
template <class T>
KNN_FN PairFactors<T> NoFactors() {
  return {-T(0), 0, 0, 0};
}
// Whether the pair that has this factor of g adds anything.
template <class T>
KNN_FN bool Adds(T feature) {
  return !(feature == 0 && std::signbit(feature));
}

// b is ⟨g, f⟩.
template <class T>
KNN_FN PairFactors<T> FirstOrderFactors(T w, T b, T ct_w, T ct_d) {
  return {w, T{}, ct_d, -w * (b + ct_w)};
}

// a is ⟨g, ḟ⟩, or all of Ȧ.
template <class T>
KNN_FN PairFactors<T> SecondOrderFactors(T w, T b, T ct_w, T ct_d, T a, T s_e) {
  const T A = b + ct_w;
  return {T{} - w * s_e, -w * Fma(-A, s_e, a), ct_d, -w * A};
}

// The gradient in d of what second order adds through the metric; adds that in the parameters to m_bar.
template <class M, class T>
KNN_FN Vec3<T> SecondOrderGradient(const typename M::Parameters& m, Vec3<T> d, Vec3<T> dd,
                                   const typename M::Parameters& dm, const PairFactors<T>& by,
                                   typename M::Parameters& m_bar) {
  return M::SecondGradient(m, d, dd, dm, by.a_e, {by.dist, by.exponent}, m_bar);
}
template <class M, class T>
KNN_FN Vec3<T> SecondOrderGradient(const typename M::Parameters& m, Vec3<T> d, Vec3<T> dd,
                                   const typename M::Parameters& dm, const MovingFactors<T>& by,
                                   typename M::Parameters& m_bar) {
  return M::SecondGradient(m, d, dd, dm, Pair<T>{by.a_dist, by.a_e}, {by.dist, by.exponent}, m_bar);
}

}  // namespace knn::KNN_ISA

#endif  // JKA_KNN_AGGREGATE_FORMULAS_H_
