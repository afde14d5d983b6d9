// Activations with two derivatives, and how a perceptron's derivatives are made of these.
//
// With h_0 = x, layer l = 1, …, L has p_l = W_l h_{l−1} + b_l and h_l = σ_l(p_l); y = h_L. Of ⟨ct, y⟩, with a_l the
// gradient in h_l and β_l that in p_l, from a_L = ct downwards:
//
//   β_l = a_l σ_l'(p_l)     a_{l−1} = W_lᵀ β_l     W̄_l = Σ β_l h_{l−1}ᵀ     b̄_l = Σ β_l     x̄ = a_0
//
// with sums over rows. Along tangents, which a dot marks, of x, all W and b, and ct:
//
//   ṗ_l = W_l ḣ_{l−1} + Ẇ_l h_{l−1} + ḃ_l              ḣ_l = σ_l' ṗ_l             ẏ = ḣ_L
//   β̇_l = ȧ_l σ_l' + a_l σ_l'' ṗ_l                     ȧ_{l−1} = W_lᵀ β̇_l + Ẇ_lᵀ β_l
//   dW̄_l = Σ β̇_l h_{l−1}ᵀ + β_l ḣ_{l−1}ᵀ               db̄_l = Σ β̇_l              dx̄ = ȧ_0
//
// These are all that second order needs, as the Hessian of ⟨ct, y⟩ is symmetric. Both ways use σ, σ' and σ'' at p_l and
// nothing beyond: a kernel may keep σ_l' and σ_l'' ṗ_l of the way up in the place of p_l and ṗ_l.
//
// Of 16-bit arrays p, σ and β are float, and h, a and their tangents are rounded as they are stored.

#ifndef JKA_MLP_FORMULAS_H_
#define JKA_MLP_FORMULAS_H_

#include <type_traits>

#include "common/dual.h"
#include "mlp/mlp.h"

namespace knn::KNN_ISA {

// What formulas use besides what numbers have in common/numeric.h; of vectors see cpu.cc.
KNN_FN float Sqrt(float x) { return ::sqrtf(x); }
KNN_FN double Sqrt(double x) { return ::sqrt(x); }
KNN_FN float ExpOfNegative(float x) { return Exp(x); }
KNN_FN double ExpOfNegative(double x) { return Exp(x); }
KNN_FN float Expm1(float x) { return ::expm1f(x); }
KNN_FN double Expm1(double x) { return ::expm1(x); }
KNN_FN float Log1p(float x) { return ::log1pf(x); }
KNN_FN double Log1p(double x) { return ::log1p(x); }
KNN_FN float Erfc(float x) { return ::erfcf(x); }
KNN_FN double Erfc(double x) { return ::erfc(x); }
template <class T>
KNN_FN T SelectLess(T a, T b, T less, T otherwise) {
  return a < b ? less : otherwise;
}

// σ, σ' and σ'' at one p. Code for those that are not used falls away where this is inlined.
template <class V>
struct Jet {
  V value, slope, bend;
};

// V is a float, a double, or a vector of these.
template <class V>
KNN_FN V Number(double c) {
  if constexpr (std::is_floating_point_v<V>) {
    return static_cast<V>(c);
  } else {
    return V::Broadcast(c);
  }
}

// −|x|, and the larger of x and 0; NaN of NaN.
template <class V>
KNN_FN V MinusSize(V x) {
  return SelectLess(x, Number<V>(0), x, -x);
}
template <class V>
KNN_FN V Positive(V x) {
  const V zero = Number<V>(0);
  return SelectLess(x, zero, zero, x);
}

// The logistic function s of z, and 1 − s, both with all their digits however large z is: with e = exp(−|z|) they are
// 1 / (1 + e) and e / (1 + e).
template <class V>
struct Logistic {
  V s, rest;
  V log;  // log1p(e)
};

template <class V>
KNN_FN Logistic<V> LogisticOf(V z) {
  const V zero = Number<V>(0), one = Number<V>(1);
  const V e = ExpOfNegative(MinusSize(z)), larger = one / (one + e), smaller = e * larger;
  return {SelectLess(z, zero, smaller, larger), SelectLess(z, zero, larger, smaller), Log1p(e)};
}

// An activation's parameter c and its inverse, worked out once and not at each p.
template <class V>
struct Parameter {
  V c, inverse;
};
template <class V>
KNN_FN Parameter<V> ParameterOf(double c) {
  return {Number<V>(c), Number<V>(1 / c)};
}

// The activation `kind` at p. Where p is NaN the value is NaN.
template <ActivationKind kind, class V>
KNN_FN Jet<V> Activate(V p, Parameter<V> parameter) {
  const V c = parameter.c;
  using K = ActivationKind;
  const V zero = Number<V>(0), one = Number<V>(1);
  if constexpr (kind == K::relu) {
    return {Positive(p), SelectLess(zero, p, one, zero), zero};
  } else if constexpr (kind == K::leaky_relu) {
    return {SelectLess(p, zero, c * p, p), SelectLess(p, zero, c, one), zero};
  } else if constexpr (kind == K::softplus) {
    const Logistic<V> l = LogisticOf(c * p);
    return {Positive(p) + l.log * parameter.inverse, l.s, c * (l.s * l.rest)};
  } else if constexpr (kind == K::sine) {
    const V z = c * p, sin = Sin(z);
    return {sin, c * Cos(z), -c * (c * sin)};
  } else if constexpr (kind == K::silu) {
    const Logistic<V> l = LogisticOf(p);
    const V slope = l.s * l.rest;
    return {p * l.s, l.s + p * slope, slope * (Number<V>(2) + p * (l.rest - l.s))};
  } else if constexpr (kind == K::tanh) {
    // With e = exp(−2|p|), |tanh p| = (1 − e) / (1 + e) and its derivative is 4 e / (1 + e)².
    const V z = Scale(-2, SelectLess(p, zero, -p, p)), e = ExpOfNegative(z), scale = one / (one + e);
    const V size = -Expm1(z) * scale, t = SelectLess(p, zero, -size, size), slope = Scale(4, e) * (scale * scale);
    return {t, slope, Scale(-2, t * slope)};
  } else if constexpr (kind == K::sigmoid) {
    // The difference of 1 − s and s, which would cancel, is ± (e − 1) / (1 + e).
    const Logistic<V> l = LogisticOf(p);
    const V slope = l.s * l.rest, lean = Expm1(SelectLess(p, zero, p, -p)) * SelectLess(p, zero, l.rest, l.s);
    return {l.s, slope, slope * SelectLess(p, zero, -lean, lean)};
  } else if constexpr (kind == K::exponential) {
    const V e = Exp(p);
    return {e, e, e};
  } else if constexpr (kind == K::squareplus) {
    // With k = 2/c and h = √(p² + k²), f = (p + h)/2, f' = f/h and f'' = k²/(2h³). At p < 0, where f would cancel, it
    // is k²/4 over (h + |p|)/2.
    const V half = parameter.inverse, k = half + half, size = SelectLess(p, zero, -p, p);
    const V larger = SelectLess(size, k, k, size), smaller = SelectLess(size, k, size, k), ratio = smaller / larger;
    const V h = larger * Sqrt(one + ratio * ratio), far = Scale(0.5, h) + Scale(0.5, size);
    const V value = SelectLess(p, zero, half * (half / far), far), part = k / h;
    return {value, value / h, part * part * (Number<V>(0.5) / h)};
  } else if constexpr (kind == K::gelu) {
    // p s(w(p)) with w = 2 √(2/π) (p + 0.044715 p³), as (1 + tanh(w/2))/2 is the logistic function s of w. Where w is
    // so large that s is 0 or 1, its argument is kept from overflowing.
    constexpr double kRoot = 2 * 0.7978845608028654, kCube = 0.044715;
    const V most = Number<V>(50), least = Number<V>(-50), low = SelectLess(p, least, least, p);
    const V q = SelectLess(most, low, most, low), square = q * q;
    const Logistic<V> l = LogisticOf(Scale(kRoot, q) * (one + Scale(kCube, square)));
    const V w1 = Number<V>(kRoot) + Scale(3 * kRoot * kCube, square), w2 = Scale(6 * kRoot * kCube, q);
    const V slope = l.s * l.rest;
    return {p * l.s, l.s + p * (slope * w1), slope * (Scale(2, w1) + p * ((l.rest - l.s) * (w1 * w1) + w2))};
  } else if constexpr (kind == K::gelu_exact) {
    // p Φ(p), with Φ = erfc(−p/√2)/2 and its derivative φ.
    const V below = Scale(0.5, Erfc(Scale(-0.7071067811865476, p)));
    const V density = Scale(0.3989422804014327, ExpOfNegative(Scale(-0.5, p * p)));
    return {p * below, below + p * density, density * Number<V>(2) - p * (p * density)};
  } else {
    return {p, one, zero};
  }
}

template <ActivationKind kind, class V>
KNN_FN Jet<V> Activate(V p, double c) {
  return Activate<kind>(p, ParameterOf<V>(c));
}

// Calls run(std::integral_constant<ActivationKind, kind>()).
template <class Run>
KNN_FN void WithKind(ActivationKind kind, Run&& run) {
  using K = ActivationKind;
  const auto with = [&](auto k) {
    if (kind == decltype(k)::value) run(k);
  };
  with(std::integral_constant<K, K::none>());
  with(std::integral_constant<K, K::relu>());
  with(std::integral_constant<K, K::leaky_relu>());
  with(std::integral_constant<K, K::softplus>());
  with(std::integral_constant<K, K::sine>());
  with(std::integral_constant<K, K::silu>());
  with(std::integral_constant<K, K::tanh>());
  with(std::integral_constant<K, K::sigmoid>());
  with(std::integral_constant<K, K::exponential>());
  with(std::integral_constant<K, K::squareplus>());
  with(std::integral_constant<K, K::gelu>());
  with(std::integral_constant<K, K::gelu_exact>());
}

}  // namespace knn::KNN_ISA

#endif  // JKA_MLP_FORMULAS_H_
