// Functions of SIMD vectors beyond those of simd.h, each to a few units in the last place unless it says otherwise.

#ifndef JKA_COMMON_SIMD_MATH_H_
#define JKA_COMMON_SIMD_MATH_H_

#include <utility>

#include "common/simd.h"

namespace knn::KNN_ISA {

template <class T>
KNN_FN Vec<T> SelectLess(Vec<T> a, Vec<T> b, Vec<T> less, Vec<T> otherwise) {
  return Select(a.v < b.v, less, otherwise);
}

template <class T>
KNN_FN Vec<T> Abs(Vec<T> x) {
  return SelectLess(x, Vec<T>{}, -x, x);
}

template <class T>
KNN_FN bool AllLessEqual(Vec<T> a, Vec<T> b) {
  return LessEqualMask(a, b) == (1u << Vec<T>::kLanes) - 1;
}

// Exchanges, in pairs of vectors `distance` apart, the blocks of so many lanes off the diagonal.
template <int distance, class T, int... lane>
KNN_FN void ExchangeBlocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, lane...>) {
  constexpr int kLanes = Vec<T>::kLanes;
  const Vec<T> first = Lanes<((lane & distance) == 0 ? lane : kLanes + lane - distance)...>(a, b);
  b = Lanes<((lane & distance) == 0 ? lane + distance : kLanes + lane)...>(a, b);
  a = first;
}

// Lane l of vector v goes to lane v of vector l.
template <int distance = 1, class T>
KNN_FN void Transpose(Vec<T> (&x)[Vec<T>::kLanes]) {
  constexpr int kLanes = Vec<T>::kLanes;
  if constexpr (distance < kLanes) {
#pragma GCC unroll 16
    for (int v = 0; v < kLanes; ++v) {
      if ((v & distance) == 0) {
        ExchangeBlocks<distance>(x[v], x[v + distance], std::make_integer_sequence<int, kLanes>());
      }
    }
    Transpose<2 * distance>(x);
  }
}

// Each lane by a function of scalars.
template <class T, class F>
KNN_FN Vec<T> ByLane(Vec<T> x, F&& function) {
  T lanes[Vec<T>::kLanes];
  x.Store(lanes);
  for (T& lane : lanes) lane = function(lane);
  return Vec<T>::Load(lanes);
}

// ---- Polynomials

template <int n>
struct Series {
  double c[n] = {};

  // f(0), f(1), …
  template <class F>
  static constexpr Series Of(F&& f) {
    Series series;
    for (int i = 0; i < n; ++i) series.c[i] = f(i);
    return series;
  }
};
constexpr double Factorial(int n) { return n < 2 ? 1 : n * Factorial(n - 1); }

// c[0] + c[1] x + c[2] x² + … by Estrin's scheme: powers[k] is x to the 2ᵏ, and halves do not wait for each other.
template <int n, class T>
KNN_FN Vec<T> Estrin(const double* c, const Vec<T>* powers) {
  const auto at = [&](int i) { return Vec<T>::Broadcast(static_cast<T>(c[i])); };
  if constexpr (n == 1) {
    return at(0);
  } else if constexpr (n == 2) {
    return Fma(at(1), powers[0], at(0));
  } else {
    constexpr int kLog = n > 16 ? 4 : n > 8 ? 3 : n > 4 ? 2 : 1, kHalf = 1 << kLog;
    return Fma(Estrin<n - kHalf>(c + kHalf, powers), powers[kLog], Estrin<kHalf>(c, powers));
  }
}
template <int n, class T>
KNN_FN Vec<T> Polynomial(const Series<n>& series, Vec<T> x) {
  Vec<T> powers[5] = {x};
  for (int k = 1; k < 5; ++k) powers[k] = powers[k - 1] * powers[k - 1];
  return Estrin<n>(series.c, powers);
}

// ---- Functions

// 1 + x/2! + x²/3! + …, which times x is e^x − 1 for small x.
template <class T>
KNN_FN Vec<T> Expm1Series(Vec<T> x) {
  constexpr auto kSeries = Series < sizeof(T) == 4 ? 7 : 13 > ::Of([](int i) { return 1 / Factorial(i + 1); });
  return Polynomial(kSeries, x);
}

// e^x for x <= 0, as Exp of simd.h but 0 where it is subnormal, and faster.
template <class T>
KNN_FN Vec<T> ExpOfNegative(Vec<T> x) {
  using V = Vec<T>;
  using Bits = decltype(x.v < x.v);
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr int kMantissa = kFloat ? 23 : 52, kBias = kFloat ? 127 : 1023;
  constexpr double kHigh = kFloat ? 0x1.62ep-1 : 0x1.62e42feep-1;  // ln 2 in parts
  constexpr double kLow = kFloat ? 0x1.0bfbe8p-15 : 0x1.a39ef35793c76p-33;
  const auto constant = [](double c) { return V::Broadcast(static_cast<T>(c)); };
  const V least = constant(kFloat ? -87 : -708), within = Max(least, x), magic = constant(kFloat ? 0x1.8p23 : 0x1.8p52);
  const V shifted = Fma(within, constant(1.4426950408889634), magic), n = shifted - magic;
  const V r = Fma(-n, constant(kLow), Fma(-n, constant(kHigh), within));
  const V power = {(typename V::Native)(((Bits)shifted.v - (Bits)magic.v + kBias) << kMantissa)};
  return SelectLess(x, least, V{}, Fma(Expm1Series(r), r, constant(1)) * power);
}

// e^x − 1 for x <= 0: by Taylor's series where the difference would cancel.
template <class T>
KNN_FN Vec<T> Expm1(Vec<T> x) {
  const Vec<T> limit = Vec<T>::Broadcast(static_cast<T>(0.35));
  return SelectLess(Abs(x), limit, Expm1Series(x) * x, ExpOfNegative(x) - Vec<T>::Broadcast(1));
}

// log(1 + x) for 0 <= x <= 1: 2 artanh(s) at s = x / (2 + x), by Taylor's series.
template <class T>
KNN_FN Vec<T> Log1p(Vec<T> x) {
  constexpr auto kSeries = Series < sizeof(T) == 4 ? 8 : 17 > ::Of([](int i) { return 2.0 / (2 * i + 1); });
  const Vec<T> s = x / (x + Vec<T>::Broadcast(2));
  return Polynomial(kSeries, s * s) * s;
}

// sin(x + q π/2). With n the integer nearest to x / (π/2), Taylor's series at x − n π/2; lanes far out one by one.
template <int q, class T>
KNN_FN Vec<T> SinShifted(Vec<T> x) {
  using V = Vec<T>;
  using Bits = decltype(x.v < x.v);
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr int kTerms = kFloat ? 5 : 9;
  // π/2 in parts of so few bits that products of n and the first ones are exact.
  constexpr double kParts[] = {kFloat ? 0x1.92p0 : 0x1.921fb54p0, kFloat ? 0x1.fb4p-12 : 0x1.10b461p-30,
                               kFloat ? 0x1.4442d2p-24 : 0x1.a62633145c06ep-58};
  const V most = V::Broadcast(static_cast<T>(kFloat ? 8e3 : 1e7));
  if (!AllLessEqual(Abs(x), most)) {
    return ByLane(x, [](T lane) { return q == 0 ? Sin(lane) : Cos(lane); });
  }
  const V magic = V::Broadcast(static_cast<T>(kFloat ? 0x1.8p23 : 0x1.8p52));
  const V shifted = Fma(x, V::Broadcast(static_cast<T>(0.6366197723675814)), magic), n = shifted - magic;
  V r = x;
  for (double part : kParts) r = Fma(-n, V::Broadcast(static_cast<T>(part)), r);
  const V square = r * r;
  constexpr auto kSin = Series<kTerms>::Of([](int i) { return (i % 2 == 0 ? 1 : -1) / Factorial(2 * i + 1); });
  constexpr auto kCos = Series<kTerms + 1>::Of([](int i) { return (i % 2 == 0 ? 1 : -1) / Factorial(2 * i); });
  const V sin = Polynomial(kSin, square) * r, cos = Polynomial(kCos, square);
  const Bits quarter = (Bits)shifted.v - (Bits)magic.v + q;
  const V size = Select((quarter & 1) != 0, cos, sin);
  return Select((quarter & 2) != 0, -size, size);
}

template <class T>
KNN_FN Vec<T> Sin(Vec<T> x) {
  return SinShifted<0>(x);
}
template <class T>
KNN_FN Vec<T> Cos(Vec<T> x) {
  return SinShifted<1>(x);
}

// 1 − erf(x), to 1e-6 of its size (Press et al., Numerical Recipes: erfcc).
KNN_FN Vec<float> Erfc(Vec<float> x) {
  using V = Vec<float>;
  constexpr Series<10> kSeries = {{-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807,
                                   -1.13520398, 1.48851587, -0.82215223, 0.17087277}};
  const V z = Abs(x), t = V::Broadcast(1) / Fma(z, V::Broadcast(0.5f), V::Broadcast(1));
  const V upper = t * ExpOfNegative(Polynomial(kSeries, t) - z * z);
  return SelectLess(x, V{}, V::Broadcast(2) - upper, upper);
}
KNN_FN Vec<double> Erfc(Vec<double> x) {
  return ByLane(x, [](double lane) { return ::erfc(lane); });
}

}  // namespace knn::KNN_ISA

#endif  // JKA_COMMON_SIMD_MATH_H_
