// How short distances to a point can be: lambda and axis of index.h.

#ifndef JKA_KNN_INDEX_BOUNDS_H_
#define JKA_KNN_INDEX_BOUNDS_H_

#include <type_traits>

#include "common/dual.h"
#include "knn/metric.h"

namespace knn::KNN_ISA {

template <class D>
struct Factors {
  D lambda, axis[3];
};

template <class D>
KNN_FN D Number(double x) {
  if constexpr (std::is_same_v<D, double>) {
    return x;
  } else {
    return D::Broadcast(x);
  }
}
KNN_FN double Max(double a, double b) { return a > b ? a : b; }
KNN_FN double Sqrt(double a) { return std::sqrt(a); }
KNN_FN double Flushed(double a, double least) { return a < least ? 0 : a; }

// (m/ε)² of what follows, or the least normal double where that is larger.
template <class T>
constexpr double kLeastSquare = DBL_MIN;
template <>
constexpr double kLeastSquare<float> = 0x1p-206;
static_assert(double{FLT_MIN} / FLT_EPSILON * (double{FLT_MIN} / FLT_EPSILON) == kLeastSquare<float>);

// The squares of lambda and axis of index.h for a point, or a vector of points, whose sigma are not negative. D is
// double or a vector of doubles. With unit rows r_i of R, M = s Σ w_i r_i r_iᵀ where w_i = sigma_i |R_i|² / s and s =
// tr M. By Cauchy and Binet the coefficients of det(M/s − x) are sums of products that cannot cancel: with n_ij = r_i ×
// r_j,
//
//   c₀ = det M/s³ = w_0 w_1 w_2 det(r)²,   C_a = Σ_{i<j} w_i w_j (n_ij)_a²,   c₁ = Σ_a C_a,   c₂ = 1,
//
// and (M⁻¹)_aa = C_a / (s c₀). Laguerre's iteration from 0 rises to the least root and does not pass it; three steps
// reach it. Rounding may move a triple root by 10⁻⁵ of it. A sigma below the least normal number m counts as 0, since
// it may be read as that; and as m in κ, since its products may underflow. An entry of R below m may be read as 0 as
// well, which moves u_i by up to √3 m |d|: κ covers that, as rows count there as if of a square of at least (m/ε)². A
// row whose square underflows counts as 0. A w that underflows counts only where the bound is 0 all the same (tight is
// 0 unless all w are above 2⁻¹⁰⁰ s), or s is so small that it is made 0. Whatever overflows ends as NaN or infinity,
// and so as no bound.
template <class T, class D>
KNN_FN Factors<D> SquaredFactors(const D (&sigma)[3], const D (&R)[9]) {
  const D zero = Number<D>(0), one = Number<D>(1), least = Number<D>(Precision<T>::kLeast);
  const D round = Number<D>(16 * DBL_EPSILON), slack = Number<D>(1 - 0x1p-12);
  const auto absolute = [&](D x) { return Max(x, zero - x); };
  D squares[3], r[9], w[3], s = zero, noise = zero;
  for (int i = 0; i < 3; ++i) {
    const D* row = R + 3 * i;
    squares[i] = row[0] * row[0] + row[1] * row[1] + row[2] * row[2];
    const D norm = Sqrt(Max(squares[i], Number<D>(DBL_MIN)));
    for (int c = 0; c < 3; ++c) r[3 * i + c] = row[c] / norm;
    w[i] = Flushed(sigma[i], least) * Max(squares[i] - Number<D>(DBL_MIN), zero);
    s = s + w[i];
    noise = noise + Max(sigma[i], least) * Max(squares[i], Number<D>(kLeastSquare<T>));
  }
  for (int i = 0; i < 3; ++i) w[i] = w[i] / s;
  D cofactor[3] = {zero, zero, zero}, det = zero;
  for (int i = 0; i < 3; ++i) {
    const int j = (i + 1) % 3, k = (i + 2) % 3;
    for (int a = 0; a < 3; ++a) {
      const int b = (a + 1) % 3, c = (a + 2) % 3;
      const D n = r[3 * i + b] * r[3 * j + c] - r[3 * i + c] * r[3 * j + b];
      const D most = absolute(n) + round;
      cofactor[a] = cofactor[a] + w[i] * w[j] * most * most;
      if (i == 0) det = det + n * r[3 * k + a];
    }
  }
  det = Max(absolute(det) - round, zero);
  const D c0 = w[0] * w[1] * w[2] * det * det, c1 = cofactor[0] + cofactor[1] + cofactor[2];
  D x = zero;
  for (int step = 0; step < 3; ++step) {
    const D f = ((x - one) * x + c1) * x - c0, df = (Scale(3, x) - Number<D>(2)) * x + c1;
    const D ddf = Scale(6, x) - Number<D>(2);
    x = x - Scale(3, f) / (df + Sqrt(Max(Scale(4, df * df) - Scale(6, f * ddf), zero)));
  }
  const D kappa = Scale(4 * Precision<T>::kEpsilon, Sqrt(noise / s)), root = Sqrt(x * slack);
  const D tight = Max(one - kappa / root, zero);
  const D scale = Max(s - Number<D>(DBL_MIN * 0x1p110), zero) * tight * tight;
  Factors<D> squared = {scale * x * slack, {}};
  for (int a = 0; a < 3; ++a) squared.axis[a] = scale * c0 / cofactor[a] * slack;
  return squared;
}

// Rounded down, generously; to 0 below the least normal number, where rounding errors are not relative.
template <class T>
KNN_FN T RoundDown(double x) {
  constexpr double kLeast = Precision<T>::kLeast, kMost = Precision<T>::kMost;
  constexpr T kDown = 1 - 16 * Precision<T>::kEpsilon;
  return kDown * static_cast<T>(x > kLeast ? (x < kMost ? x : kMost) : 0);
}

// lambda and axis of a point.
template <class T>
KNN_FN Factors<double> FactorsOf(const typename Anisotropic<T>::Parameters& m) {
  const double sigma[3] = {double(m.sigma.x), double(m.sigma.y), double(m.sigma.z)};
  const double R[9] = {double(m.R.row[0].x), double(m.R.row[0].y), double(m.R.row[0].z),
                       double(m.R.row[1].x), double(m.R.row[1].y), double(m.R.row[1].z),
                       double(m.R.row[2].x), double(m.R.row[2].y), double(m.R.row[2].z)};
  const Factors<double> squared = SquaredFactors<T>(sigma, R);
  return {Sqrt(squared.lambda), {Sqrt(squared.axis[0]), Sqrt(squared.axis[1]), Sqrt(squared.axis[2])}};
}
template <class T>
KNN_FN Factors<double> FactorsOf(const typename Isotropic<T>::Parameters& /*m*/) {
  return {1, {0, 0, 0}};
}

}  // namespace knn::KNN_ISA

#endif  // JKA_KNN_INDEX_BOUNDS_H_
