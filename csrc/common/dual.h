// Dual numbers: a formula instantiated with them gives its value and its derivative along a tangent, so that forward
// mode, and second order of a scalar's gradient, need no formulas of their own.

#ifndef JKA_COMMON_DUAL_H_
#define JKA_COMMON_DUAL_H_

#include <type_traits>

#include "common/numeric.h"

namespace knn::KNN_ISA {

template <class T>
struct Dual {
  T value, tangent;
};

template <class T>
KNN_FN Dual<T> operator+(Dual<T> a, Dual<T> b) {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <class T>
KNN_FN Dual<T> operator-(Dual<T> a, Dual<T> b) {
  return {a.value - b.value, a.tangent - b.tangent};
}
template <class T>
KNN_FN Dual<T> operator*(Dual<T> a, Dual<T> b) {
  return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
}

template <class T>
KNN_FN Dual<T> operator*(T a, Dual<T> b) {
  return {a * b.value, a * b.tangent};
}

template <class T>
KNN_FN Dual<T> Fma(Dual<T> a, Dual<T> b, Dual<T> c) {
  return {Fma(a.value, b.value, c.value), Fma(a.value, b.tangent, Fma(a.tangent, b.value, c.tangent))};
}
template <class T>
KNN_FN Dual<T> operator-(Dual<T> a) {
  return {-a.value, -a.tangent};
}
template <class T>
KNN_FN Dual<T> operator/(Dual<T> a, Dual<T> b) {
  const T quotient = a.value / b.value;
  return {quotient, (a.tangent - quotient * b.tangent) / b.value};
}

// c·x for a constant c.
KNN_FN float Scale(double c, float x) { return static_cast<float>(c) * x; }
KNN_FN double Scale(double c, double x) { return c * x; }
template <class T>
KNN_FN Dual<T> Scale(double c, Dual<T> x) {
  return {Scale(c, x.value), Scale(c, x.tangent)};
}

template <class T>
KNN_FN Dual<T> Sin(Dual<T> x) {
  return {Sin(x.value), Cos(x.value) * x.tangent};
}
template <class T>
KNN_FN Dual<T> Cos(Dual<T> x) {
  return {Cos(x.value), -Sin(x.value) * x.tangent};
}

// As N, a number that does not move.
template <class N, class T>
KNN_FN N Constant(T x) {
  if constexpr (std::is_same_v<N, T>) {
    return x;
  } else {
    return {x, T{}};
  }
}

template <class T>
KNN_FN T ValueOf(T x) {
  return x;
}
template <class T>
KNN_FN T ValueOf(Dual<T> x) {
  return x.value;
}

// What a kernel returns of x: the tangent if there is one.
template <class T>
KNN_FN T Result(T x) {
  return x;
}
template <class T>
KNN_FN T Result(Dual<T> x) {
  return x.tangent;
}

}  // namespace knn::KNN_ISA

#endif  // JKA_COMMON_DUAL_H_
