// The two metrics with their first and second derivatives: the one copy of the maths that every kernel includes.
//
// With d = q − p, both metrics give a distance D that ranks neighbours and an exponent e, the weight being exp(−e):
//
//   anisotropic   u = R d,  D = e = Σ_i sigma_i u_i²
//   isotropic     D = |d|²,  e = sigma D
//
// R d comes first: multiplying out Rᵀ diag(sigma) R would lose digits as the anisotropy grows. sigma may have any sign,
// so there are no square roots.
//
// First order, the gradient of  a_D D + a_e e  (a_D, a_e constants), with a = a_D + a_e:
//
//   anisotropic   g = 2 a sigma∘u        d̄ = Rᵀ g      sigmā = a u∘u     R̄ = g dᵀ
//   isotropic     h = a_D + a_e sigma    d̄ = 2 h d     sigmā = a_e D
//
// Tangents along (ḋ, sigmȧ, Ṙ), written s_D and s_e:
//
//   anisotropic   u̇ = R ḋ + Ṙ d,  s_D = s_e = Σ_i (2 sigma_i u_i u̇_i + sigmȧ_i u_i²)
//   isotropic     s_D = 2 d·ḋ,  s_e = sigmȧ D + sigma s_D
//
// Second order, the gradient of  a_D D + a_e e + c_D s_D + c_e s_e  in (d, sigma, R), the tangents held fixed, with
// a = a_D + a_e and c = c_D + c_e:
//
//   anisotropic   g = 2 (a sigma∘u + c (sigma∘u̇ + sigmȧ∘u)) is the gradient in u, ġ = 2 c sigma∘u that in u̇, and so
//                 d̄ = Rᵀ g + Ṙᵀ ġ      sigmā = a u∘u + 2 c u∘u̇      R̄ = g dᵀ + ġ ḋᵀ
//   isotropic     d̄ = 2 (a_D + a_e sigma + c_e sigmȧ) d + 2 (c_D + c_e sigma) ḋ      sigmā = a_e D + c_e s_D

#ifndef JKA_KNN_METRIC_H_
#define JKA_KNN_METRIC_H_

#include "common/numeric.h"

namespace knn {

enum class MetricKind { kAnisotropic, kIsotropic };

}  // namespace knn

namespace knn::KNN_ISA {

template <class T>
struct Vec3 {
  T x, y, z;
};

template <class T>
KNN_FN Vec3<T> operator-(Vec3<T> a, Vec3<T> b) {
  return {a.x - b.x, a.y - b.y, a.z - b.z};
}

template <class T>
KNN_FN void Accumulate(Vec3<T>& sum, Vec3<T> a) {
  sum.x += a.x;
  sum.y += a.y;
  sum.z += a.z;
}

template <class T>
KNN_FN T Dot(Vec3<T> a, Vec3<T> b) {
  return Fma(a.z, b.z, Fma(a.y, b.y, a.x * b.x));
}

template <class T>
KNN_FN Vec3<T> Load3(const T* a) {
  return {a[0], a[1], a[2]};
}

// A 3×3 matrix by rows.
template <class T>
struct Mat3 {
  Vec3<T> row[3];
};

template <class T>
KNN_FN Vec3<T> operator*(const Mat3<T>& m, Vec3<T> a) {
  return {Dot(m.row[0], a), Dot(m.row[1], a), Dot(m.row[2], a)};
}

template <class T>
KNN_FN Vec3<T> TransposeTimes(const Mat3<T>& m, Vec3<T> a) {
  return {Dot(Vec3<T>{m.row[0].x, m.row[1].x, m.row[2].x}, a), Dot(Vec3<T>{m.row[0].y, m.row[1].y, m.row[2].y}, a),
          Dot(Vec3<T>{m.row[0].z, m.row[1].z, m.row[2].z}, a)};
}

// sum += a bᵀ.
template <class T>
KNN_FN void AccumulateOuter(Mat3<T>& sum, Vec3<T> a, Vec3<T> b) {
  const T s[3] = {a.x, a.y, a.z};
  for (int i = 0; i < 3; ++i) {
    sum.row[i].x = Fma(s[i], b.x, sum.row[i].x);
    sum.row[i].y = Fma(s[i], b.y, sum.row[i].y);
    sum.row[i].z = Fma(s[i], b.z, sum.row[i].z);
  }
}

// A symmetric matrix, in double: for bounds on distances, not for distances.
struct Form {
  double xx, yy, zz, xy, xz, yz;
};

// Distance and exponent, or their tangents, or the factors that multiply them.
template <class T>
struct Pair {
  T dist, exponent;
};

template <class T>
struct Anisotropic {
  static constexpr MetricKind kKind = MetricKind::kAnisotropic;
  static constexpr int kSigma = 3;  // scalars in sigma
  static constexpr int kR = 9;      // scalars in R

  // A point's parameters, or their tangents or cotangents.
  struct Parameters {
    Vec3<T> sigma;
    Mat3<T> R;
  };

  KNN_FN static Parameters Load(const T* sigma, const T* R) {
    return {Load3(sigma), {{Load3(R), Load3(R + 3), Load3(R + 6)}}};
  }

  // Tangents, zero where there are none.
  KNN_FN static Parameters LoadTangents(const T* sigma, const T* R) {
    Parameters m = {};
    if (sigma != nullptr) m.sigma = Load3(sigma);
    if (R != nullptr) m.R = {{Load3(R), Load3(R + 3), Load3(R + 6)}};
    return m;
  }

  KNN_FN static T Distance(const Parameters& m, Vec3<T> d) {
    const Vec3<T> u = m.R * d;
    return Fma(m.sigma.z * u.z, u.z, Fma(m.sigma.y * u.y, u.y, m.sigma.x * u.x * u.x));
  }

  // M of dist = dᵀMd.
  KNN_FN static Form QuadraticForm(const Parameters& m) {
    Form form = {};
    const T sigma[3] = {m.sigma.x, m.sigma.y, m.sigma.z};
    for (int i = 0; i < 3; ++i) {
      const double s = sigma[i], x = m.R.row[i].x, y = m.R.row[i].y, z = m.R.row[i].z;
      form.xx += s * x * x, form.yy += s * y * y, form.zz += s * z * z;
      form.xy += s * x * y, form.xz += s * x * z, form.yz += s * y * z;
    }
    return form;
  }

  // A bound on what dist is a sum of: |terms of dist| together are at most Magnitude · (max_a |d_a|)².
  KNN_FN static double Magnitude(const Parameters& m) {
    const T sigma[3] = {m.sigma.x, m.sigma.y, m.sigma.z};
    double sum = 0;
    for (int i = 0; i < 3; ++i) {
      const double row = fabs(double(m.R.row[i].x)) + fabs(double(m.R.row[i].y)) + fabs(double(m.R.row[i].z));
      sum += fabs(double(sigma[i])) * row * row;
    }
    return sum;
  }

  KNN_FN static Pair<T> Value(const Parameters& m, Vec3<T> d) {
    const T dist = Distance(m, d);
    return {dist, dist};
  }

  // The gradient in d of a.dist·D + a.exponent·e; adds that in the parameters to m_bar.
  KNN_FN static Vec3<T> Gradient(const Parameters& m, Vec3<T> d, Pair<T> a, Parameters& m_bar) {
    const T s = a.dist + a.exponent;
    const Vec3<T> u = m.R * d;
    const Vec3<T> su = {s * u.x, s * u.y, s * u.z};
    const Vec3<T> g = {2 * m.sigma.x * su.x, 2 * m.sigma.y * su.y, 2 * m.sigma.z * su.z};
    m_bar.sigma = {Fma(su.x, u.x, m_bar.sigma.x), Fma(su.y, u.y, m_bar.sigma.y), Fma(su.z, u.z, m_bar.sigma.z)};
    AccumulateOuter(m_bar.R, g, d);
    return TransposeTimes(m.R, g);
  }

  KNN_FN static Vec3<T> LocalTangent(const Parameters& m, Vec3<T> d, Vec3<T> dd, const Parameters& dm) {
    const Vec3<T> a = m.R * dd, b = dm.R * d;
    return {a.x + b.x, a.y + b.y, a.z + b.z};
  }

  // s_D and s_e along dd in d and dm in the parameters.
  KNN_FN static Pair<T> Tangent(const Parameters& m, Vec3<T> d, Vec3<T> dd, const Parameters& dm) {
    const Vec3<T> u = m.R * d, du = LocalTangent(m, d, dd, dm);
    const Vec3<T> h = {Fma(2 * m.sigma.x, du.x, dm.sigma.x * u.x), Fma(2 * m.sigma.y, du.y, dm.sigma.y * u.y),
                       Fma(2 * m.sigma.z, du.z, dm.sigma.z * u.z)};
    const T s = Dot(h, u);
    return {s, s};
  }

  // The gradient in d of a_e·e + c.dist·s_D + c.exponent·s_e; adds that in the parameters to m_bar.
  KNN_FN static Vec3<T> SecondGradient(const Parameters& m, Vec3<T> d, Vec3<T> dd, const Parameters& dm, T a_e,
                                       Pair<T> c, Parameters& m_bar) {
    const T k = c.dist + c.exponent;
    const Vec3<T> u = m.R * d, du = LocalTangent(m, d, dd, dm);
    const Vec3<T> g = {2 * Fma(m.sigma.x, Fma(k, du.x, a_e * u.x), k * dm.sigma.x * u.x),
                       2 * Fma(m.sigma.y, Fma(k, du.y, a_e * u.y), k * dm.sigma.y * u.y),
                       2 * Fma(m.sigma.z, Fma(k, du.z, a_e * u.z), k * dm.sigma.z * u.z)};
    const Vec3<T> dg = {2 * k * m.sigma.x * u.x, 2 * k * m.sigma.y * u.y, 2 * k * m.sigma.z * u.z};
    m_bar.sigma = {Fma(u.x, Fma(2 * k, du.x, a_e * u.x), m_bar.sigma.x),
                   Fma(u.y, Fma(2 * k, du.y, a_e * u.y), m_bar.sigma.y),
                   Fma(u.z, Fma(2 * k, du.z, a_e * u.z), m_bar.sigma.z)};
    AccumulateOuter(m_bar.R, g, d);
    AccumulateOuter(m_bar.R, dg, dd);
    const Vec3<T> a = TransposeTimes(m.R, g), b = TransposeTimes(dm.R, dg);
    return {a.x + b.x, a.y + b.y, a.z + b.z};
  }

  // That of a.dist·D + a.exponent·e + c.dist·s_D + c.exponent·s_e.
  KNN_FN static Vec3<T> SecondGradient(const Parameters& m, Vec3<T> d, Vec3<T> dd, const Parameters& dm, Pair<T> a,
                                       Pair<T> c, Parameters& m_bar) {
    return SecondGradient(m, d, dd, dm, a.dist + a.exponent, c, m_bar);
  }
};

template <class T>
struct Isotropic {
  static constexpr MetricKind kKind = MetricKind::kIsotropic;
  static constexpr int kSigma = 1;
  static constexpr int kR = 0;

  struct Parameters {
    T sigma;
  };

  // sigma is null in searches, whose distance does not depend on it.
  KNN_FN static Parameters Load(const T* sigma, const T* /*R*/) { return {sigma == nullptr ? T(0) : *sigma}; }
  KNN_FN static Parameters LoadTangents(const T* sigma, const T* R) { return Load(sigma, R); }

  KNN_FN static T Distance(const Parameters& /*m*/, Vec3<T> d) { return Dot(d, d); }
  KNN_FN static Form QuadraticForm(const Parameters& /*m*/) { return {1, 1, 1, 0, 0, 0}; }
  KNN_FN static double Magnitude(const Parameters& /*m*/) { return 3; }

  KNN_FN static Pair<T> Value(const Parameters& m, Vec3<T> d) {
    const T dist = Dot(d, d);
    return {dist, m.sigma * dist};
  }

  KNN_FN static Vec3<T> Gradient(const Parameters& m, Vec3<T> d, Pair<T> a, Parameters& m_bar) {
    const T h = 2 * Fma(a.exponent, m.sigma, a.dist);
    m_bar.sigma = Fma(a.exponent, Dot(d, d), m_bar.sigma);
    return {h * d.x, h * d.y, h * d.z};
  }

  KNN_FN static Pair<T> Tangent(const Parameters& m, Vec3<T> d, Vec3<T> dd, const Parameters& dm) {
    const T s = 2 * Dot(d, dd);
    return {s, Fma(dm.sigma, Dot(d, d), m.sigma * s)};
  }

  KNN_FN static Vec3<T> SecondGradient(const Parameters& m, Vec3<T> d, Vec3<T> dd, const Parameters& dm, T a_e,
                                       Pair<T> c, Parameters& m_bar) {
    const T h = 2 * Fma(a_e, m.sigma, c.exponent * dm.sigma);
    const T dh = 2 * Fma(c.exponent, m.sigma, c.dist);
    m_bar.sigma = Fma(a_e, Dot(d, d), Fma(c.exponent, 2 * Dot(d, dd), m_bar.sigma));
    return {Fma(h, d.x, dh * dd.x), Fma(h, d.y, dh * dd.y), Fma(h, d.z, dh * dd.z)};
  }

  KNN_FN static Vec3<T> SecondGradient(const Parameters& m, Vec3<T> d, Vec3<T> dd, const Parameters& dm, Pair<T> a,
                                       Pair<T> c, Parameters& m_bar) {
    const Vec3<T> g = SecondGradient(m, d, dd, dm, a.exponent, c, m_bar);
    const T h = 2 * a.dist;
    return {Fma(h, d.x, g.x), Fma(h, d.y, g.y), Fma(h, d.z, g.z)};
  }
};

}  // namespace knn::KNN_ISA

#endif  // JKA_KNN_METRIC_H_
