// Where a camera sees a Gaussian, and in which colour; and what that is differentiated. Written over N: a number, a
// SIMD vector, or a dual number of either. V is N without its tangent.
//
// Forward. With the camera x ↦ R x + t, focal lengths f and principal point c, a Gaussian at m of covariance Σ is at
// p = R m + t = (x, y, z) there and on the screen at
//
//     u = f_x x/z + c_x,   v = f_y y/z + c_y.
//
// Let x̂ be x/z limited to ±0.65 width / f_x, ŷ likewise, and r, d, n the rows of R. The projection's derivative has the
// rows (f_x/z) a and (f_y/z) b with a = r − x̂ n, b = d − ŷ n; so its covariance on the screen, and that's determinant
// by Cauchy and Binet with w = a × b, are
//
//     xx = (f_x/z)² aᵀΣa,   xy = (f_x f_y/z²) aᵀΣb,   yy = (f_y/z)² bᵀΣb,   bare = (f_x f_y/z²)² wᵀ adj(Σ) w.
//
// For Σ = Σ_k s_k² e_k e_kᵀ with the axes e_k, the columns of a rotation, these are sums over k of products of
//
//     α_k = s_k e_k·a,   β_k = s_k e_k·b,   ω_k = s_{k+1} s_{k+2} e_k·w,
//
// above all bare = (f_x f_y/z²)² Σ ω_k², which is right to the last digits, where xx·yy − xy² would lose as many as the
// ellipse is long. With ε = eps2d,
//
//     det = bare + ε (xx + yy) + ε²,   conic = (yy + ε, −xy, xx + ε) / det,   ratio = bare / det,
//
// where everything over det is in units of a power of two, so that 1/det² is in range where 1/det is.
//
// Backward. Bars are gradients, of means2d (ū, v̄), of the conic (ā, b̄, c̄ here). All over det is divided once:
//
//     bare̅ = ratio̅/det + det̅,   det̅ = −(ā a + b̄ b + c̄ c + ratio̅ ratio)/det
//     xx̅ = c̄/det + ε det̅,   xy̅ = −b̄/det,   yy̅ = ā/det + ε det̅.
//
// With h_x = 2 xx xx̅ + xy xy̅ + 2 bare bare̅ (h_y with yy) the factors f/z have f̄_x = h_x/f_x, z̄ = −(h_x + h_y)/z. Then
// aᵀΣa has the gradient (f_x/z)² xx̅, and so on; with these instead of xx̅, xy̅, yy̅, bare̅
//
//     α̅_k = 2 α_k xx̅ + β_k xy̅,   β̅_k = α_k xy̅ + 2 β_k yy̅,   ω̅_k = 2 ω_k bare̅
//
// are passed on to s_k, e_k, a, b, w as products of three factors are. A symmetric Σ = M, whose rows are M_k, has
//
//     M̄ = xx̅ a aᵀ + xy̅ a bᵀ + yy̅ b bᵀ + bare̅ ((w_{k−1} M_{k+1} − w_{k+1} M_{k−1}) × w)_k,   w̄ = 2 bare̅ adj(M) w,
//
// of which the symmetric part counts. w = a × b: ā += b × w̄, b̄ += w̄ × a. The rotation of a quaternion q is
// 1 + s E(q) with s = 2/|q|² and E quadratic; it is the same for multiples of q, so that
//
//     q̄ = s ∂⟨ē, E⟩/∂q, without its part along q.
//
// Then  n̄ = −x̂ ā − ŷ b̄,  x̂̄ = −n·ā, which goes on to x/z, or, where that is limited, to the limit and so to f_x.
//
// Colours. With g = m − centre, direction g/|g| and the harmonics b_m of it, a colour is max(0, ½ + Σ b_m sh_m). With
// its gradient where it is not 0, s̄h_m = b_m colour̅, b̄_m = ⟨sh_m, colour̅⟩, and ḡ is the direction's gradient without
// its part along g, over |g|.
//
// Second order: all of this in dual numbers, as ⟨cotangents, y⟩ has a symmetric Hessian.

#ifndef JKA_SPLAT_PROJECT_FORMULAS_H_
#define JKA_SPLAT_PROJECT_FORMULAS_H_

#include "splat/formulas.h"
#include "splat/project/project.h"

namespace knn::KNN_ISA {

// ---- What the formulas ask of N beyond common/dual.h and common/simd.h. Comparisons are of V.

template <class N>
using ValueType = decltype(ValueOf(N()));

template <class T>
KNN_FN auto Greater(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return a > b;
  } else {
    return a.v > b.v;
  }
}
// Whether x is 0: of sums of a − a, whether all a are finite.
template <class T>
KNN_FN auto IsZero(T x) {
  if constexpr (std::is_floating_point_v<T>) {
    return x == 0;
  } else {
    return x.v == 0;
  }
}

KNN_FN float Select(bool which, float a, float b) { return which ? a : b; }
KNN_FN double Select(bool which, double a, double b) { return which ? a : b; }
template <class T, class Which>
KNN_FN Dual<T> Select(Which which, Dual<T> a, Dual<T> b) {
  return {Select(which, a.value, b.value), Select(which, a.tangent, b.tangent)};
}

template <class T>
KNN_FN Dual<T> Sqrt(Dual<T> x) {
  const T root = Sqrt(x.value);
  return {root, x.tangent / (root + root)};
}

// c as N.
template <class N>
struct Number {
  static KNN_FN N Of(double c) {
    if constexpr (std::is_floating_point_v<N>) {
      return static_cast<N>(c);
    } else {
      return N::Broadcast(c);
    }
  }
};
template <class T>
struct Number<Dual<T>> {
  static KNN_FN Dual<T> Of(double c) { return {Number<T>::Of(c), T{}}; }
};

// 2^−e for |x| in [2^e, 2^(e + 1)), or the nearest normal number.
template <class T>
KNN_FN T InversePower(T x) {
  constexpr bool kFloat = sizeof(T) == 4;
  using Bits = std::conditional_t<kFloat, int32_t, int64_t>;
  constexpr int kMantissa = kFloat ? 23 : 52;
  constexpr Bits kMost = kFloat ? 254 : 2046;
  Bits bits;
  std::memcpy(&bits, &x, sizeof x);
  const Bits power = kMost - (bits >> kMantissa & (kMost + 1));
  bits = (power < 1 ? 1 : power) << kMantissa;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// ---- Vectors in space

template <class N>
struct Point {
  N x, y, z;
};
template <class N>
KNN_FN Point<N> operator+(Point<N> a, Point<N> b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z};
}
template <class N>
KNN_FN Point<N> operator-(Point<N> a, Point<N> b) {
  return {a.x - b.x, a.y - b.y, a.z - b.z};
}
template <class N>
KNN_FN Point<N> Times(N c, Point<N> a) {
  return {c * a.x, c * a.y, c * a.z};
}
// c·a + b
template <class N>
KNN_FN Point<N> Fma(N c, Point<N> a, Point<N> b) {
  return {Fma(c, a.x, b.x), Fma(c, a.y, b.y), Fma(c, a.z, b.z)};
}
template <class N>
KNN_FN N Dot(Point<N> a, Point<N> b) {
  return Fma(a.x, b.x, Fma(a.y, b.y, a.z * b.z));
}
template <class N>
KNN_FN Point<N> Cross(Point<N> a, Point<N> b) {
  return {Fma(a.y, b.z, -(a.z * b.y)), Fma(a.z, b.x, -(a.x * b.z)), Fma(a.x, b.y, -(a.y * b.x))};
}

// ---- Covariances

// Of vectors a, b, w: aᵀΣa, aᵀΣb, bᵀΣb, wᵀ adj(Σ) w, or their gradients.
template <class N>
struct Ellipse {
  N xx, xy, yy, bare;
};

template <class N>
struct Quaternion {
  N w, x, y, z;
};

// Σ s_k² e_k e_kᵀ
template <class N>
struct Ellipsoid {
  Point<N> axis[3];
  N scale[3];
};

// A multiple of q for which squares are in range, and the power of two that it was multiplied by.
template <class N>
KNN_FN Quaternion<N> InRange(Quaternion<N> q, ValueType<N>& power) {
  using V = ValueType<N>;
  const auto larger = [](V a, N b) { return Select(Greater(Abs(ValueOf(b)), a), Abs(ValueOf(b)), a); };
  power = InversePower(larger(larger(larger(Abs(ValueOf(q.w)), q.x), q.y), q.z));
  return {power * q.w, power * q.x, power * q.y, power * q.z};
}
template <class N>
KNN_FN N SquaredLength(Quaternion<N> q) {
  return Fma(q.w, q.w, Fma(q.x, q.x, Fma(q.y, q.y, q.z * q.z)));
}

template <class N>
KNN_FN Ellipsoid<N> EllipsoidOf(Quaternion<N> quat, Point<N> scale) {
  ValueType<N> power;
  const Quaternion<N> q = InRange(quat, power);
  const N one = Number<N>::Of(1), s = Number<N>::Of(2) / SquaredLength(q);
  const N xx = q.x * q.x, yy = q.y * q.y, zz = q.z * q.z, xy = q.x * q.y, yz = q.y * q.z, zx = q.z * q.x;
  const N wx = q.w * q.x, wy = q.w * q.y, wz = q.w * q.z;
  return {{{one - s * (yy + zz), s * (xy + wz), s * (zx - wy)},
           {s * (xy - wz), one - s * (zz + xx), s * (yz + wx)},
           {s * (zx + wy), s * (yz - wx), one - s * (xx + yy)}},
          {scale.x, scale.y, scale.z}};
}

// The gradient in the quaternion of ⟨bar, axes⟩.
template <class N>
KNN_FN Quaternion<N> PullAxes(Quaternion<N> quat, const Point<N> (&bar)[3]) {
  ValueType<N> power;
  const Quaternion<N> q = InRange(quat, power);
  const N square = SquaredLength(q);
  const N ax = bar[1].z - bar[2].y, ay = bar[2].x - bar[0].z, az = bar[0].y - bar[1].x;
  const N xy = bar[0].y + bar[1].x, yz = bar[1].z + bar[2].y, zx = bar[2].x + bar[0].z;
  const N xx = bar[0].x, yy = bar[1].y, zz = bar[2].z;
  const auto twice = [](N a) { return a + a; };
  const Quaternion<N> p = {Fma(q.x, ax, Fma(q.y, ay, q.z * az)),
                           Fma(q.w, ax, Fma(q.y, xy, Fma(q.z, zx, -(q.x * twice(yy + zz))))),
                           Fma(q.w, ay, Fma(q.x, xy, Fma(q.z, yz, -(q.y * twice(zz + xx))))),
                           Fma(q.w, az, Fma(q.x, zx, Fma(q.y, yz, -(q.z * twice(xx + yy)))))};
  const N along = Fma(q.w, p.w, Fma(q.x, p.x, Fma(q.y, p.y, q.z * p.z))) / square;
  const N s = power * (Number<N>::Of(2) / square);
  const auto across = [&](N a, N of_q) { return s * (a - along * of_q); };
  return {across(p.w, q.w), across(p.x, q.x), across(p.y, q.y), across(p.z, q.z)};
}

template <class N>
KNN_FN Ellipse<N> SeenAlong(const Ellipsoid<N>& e, Point<N> a, Point<N> b, Point<N> w) {
  Ellipse<N> y = {};
  for (int k = 0; k < 3; ++k) {
    const N alpha = e.scale[k] * Dot(e.axis[k], a), beta = e.scale[k] * Dot(e.axis[k], b);
    const N omega = e.scale[(k + 1) % 3] * e.scale[(k + 2) % 3] * Dot(e.axis[k], w);
    y.xx = Fma(alpha, alpha, y.xx), y.xy = Fma(alpha, beta, y.xy), y.yy = Fma(beta, beta, y.yy);
    y.bare = Fma(omega, omega, y.bare);
  }
  return y;
}

// Gradients in a, b, w, and of ellipsoids in axes and scales.
template <class N>
struct AlongBar {
  Point<N> a, b, w;
};

template <class N>
KNN_FN AlongBar<N> PullSeenAlong(const Ellipsoid<N>& e, Point<N> a, Point<N> b, Point<N> w, Ellipse<N> bar,
                                 Ellipsoid<N>& e_bar) {
  AlongBar<N> y = {};
  e_bar = {};
  for (int k = 0; k < 3; ++k) {
    const int next = (k + 1) % 3, last = (k + 2) % 3;
    const N along_a = Dot(e.axis[k], a), along_b = Dot(e.axis[k], b), along_w = Dot(e.axis[k], w);
    const N alpha = e.scale[k] * along_a, beta = e.scale[k] * along_b, area = e.scale[next] * e.scale[last];
    const N alpha_bar = Fma(alpha + alpha, bar.xx, beta * bar.xy);
    const N beta_bar = Fma(beta + beta, bar.yy, alpha * bar.xy);
    const N omega = area * along_w, omega_bar = (omega + omega) * bar.bare;
    e_bar.scale[k] = Fma(alpha_bar, along_a, Fma(beta_bar, along_b, e_bar.scale[k]));
    const N area_bar = omega_bar * along_w;
    e_bar.scale[next] = Fma(area_bar, e.scale[last], e_bar.scale[next]);
    e_bar.scale[last] = Fma(area_bar, e.scale[next], e_bar.scale[last]);
    const N of_a = e.scale[k] * alpha_bar, of_b = e.scale[k] * beta_bar, of_w = area * omega_bar;
    y.a = Fma(of_a, e.axis[k], y.a), y.b = Fma(of_b, e.axis[k], y.b), y.w = Fma(of_w, e.axis[k], y.w);
    e_bar.axis[k] = Fma(of_a, a, Fma(of_b, b, Times(of_w, w)));
  }
  return y;
}

// The symmetric part of a matrix, by rows.
template <class N>
struct Symmetric {
  N xx, xy, xz, yy, yz, zz;
  KNN_FN Point<N> Row(int k) const {
    return k == 0 ? Point<N>{xx, xy, xz} : k == 1 ? Point<N>{xy, yy, yz} : Point<N>{xz, yz, zz};
  }
};
template <class N>
KNN_FN Point<N> operator*(const Symmetric<N>& m, Point<N> a) {
  return {Dot(m.Row(0), a), Dot(m.Row(1), a), Dot(m.Row(2), a)};
}
template <class N>
KNN_FN Symmetric<N> SymmetricPart(const N (&m)[9]) {
  const auto mean = [](N a, N b) { return Scale(0.5, a + b); };
  return {m[0], mean(m[1], m[3]), mean(m[2], m[6]), m[4], mean(m[5], m[7]), m[8]};
}
template <class N>
KNN_FN Symmetric<N> Adjugate(const Symmetric<N>& m) {
  const Point<N> x = Cross(m.Row(1), m.Row(2)), y = Cross(m.Row(2), m.Row(0));
  return {x.x, x.y, x.z, y.y, y.z, Cross(m.Row(0), m.Row(1)).z};
}

template <class N>
KNN_FN Ellipse<N> SeenAlong(const Symmetric<N>& m, Point<N> a, Point<N> b, Point<N> w) {
  const Point<N> of_b = m * b;
  return {Dot(a, m * a), Dot(a, of_b), Dot(b, of_b), Dot(w, Adjugate(m) * w)};
}

template <class N>
KNN_FN AlongBar<N> PullSeenAlong(const Symmetric<N>& m, Point<N> a, Point<N> b, Point<N> w, Ellipse<N> bar,
                                 Symmetric<N>& m_bar) {
  const Point<N> of_a = m * a, of_b = m * b;
  const N xx = bar.xx + bar.xx, yy = bar.yy + bar.yy;
  const auto row = [&](Point<N> minor, N a_k, N b_k) {
    return Fma(bar.xx * a_k, a, Fma(bar.xy * a_k, b, Fma(bar.yy * b_k, b, Times(bar.bare, Cross(minor, w)))));
  };
  const auto minor = [](N c, Point<N> x, N d, Point<N> y) { return Times(c, x) - Times(d, y); };
  const Point<N> rows[3] = {m.Row(0), m.Row(1), m.Row(2)};
  const Point<N> x = row(minor(w.z, rows[1], w.y, rows[2]), a.x, b.x);
  const Point<N> y = row(minor(w.x, rows[2], w.z, rows[0]), a.y, b.y);
  const Point<N> z = row(minor(w.y, rows[0], w.x, rows[1]), a.z, b.z);
  m_bar = SymmetricPart<N>({x.x, x.y, x.z, y.x, y.y, y.z, z.x, z.y, z.z});
  return {Fma(xx, of_a, Times(bar.xy, of_b)), Fma(yy, of_b, Times(bar.xy, of_a)),
          Times(bar.bare + bar.bare, Adjugate(m) * w)};
}

// ---- The camera

template <class N>
struct Camera {
  Point<N> right, down, forward, translation;  // the rows of the rotation
  N fx, fy, cx, cy;
  Point<N> centre;
  N most_x, most_y;  // of |x/z|, |y/z| in the covariance

  // at(i) is number i of an array of `size`.
  template <class At>
  KNN_FN Camera(At&& at, const Screen& screen, int size) {
    const auto point = [&](int i) { return Point<N>{at(i), at(i + 1), at(i + 2)}; };
    right = point(0), down = point(3), forward = point(6), translation = point(9);
    fx = at(12), fy = at(13), cx = at(14), cy = at(15);
    centre = size > kCameraSize ? point(16) : Point<N>{};
    most_x = Number<N>::Of(0.65 * screen.width) / fx;
    most_y = Number<N>::Of(0.65 * screen.height) / fy;
  }
};

// ---- On the screen

// What all of it has in common, and is not worth computing twice.
template <class N>
struct View {
  Point<N> position;
  N per_z, slope_x, slope_y;  // 1/z, x/z, y/z
  N limited_x, limited_y;
  N sx, sy;  // f/z
  Point<N> a, b, w;
  Ellipse<N> bare;     // without f/z and eps2d
  Ellipse<N> ellipse;  // with f/z, without eps2d
  N xx, yy, det;
  ValueType<N> unit;
  N per_unit_det;  // unit² is a factor of the determinant here
  // Results, the opacity's factor of antialiasing among them.
  N u, v, conic[3], ratio, factor;

  // x / det, in units in which all is in range.
  KNN_FN N PerDet(N x) const { return unit * ((unit * x) * per_unit_det); }
};

inline constexpr double kLeastRatio = 2.5e-5;

template <class N>
KNN_FN N Limited(N slope, N most) {
  const auto above = Greater(ValueOf(slope), ValueOf(most)), below = Greater(-ValueOf(most), ValueOf(slope));
  return Select(above, most, Select(below, -most, slope));
}

template <class N>
KNN_FN void Locate(const Camera<N>& camera, Point<N> mean, View<N>& view) {
  view.position = Point<N>{Dot(camera.right, mean), Dot(camera.down, mean), Dot(camera.forward, mean)};
  view.position = view.position + camera.translation;
  view.per_z = Number<N>::Of(1) / view.position.z;
  view.slope_x = view.position.x * view.per_z, view.slope_y = view.position.y * view.per_z;
  view.u = Fma(camera.fx, view.slope_x, camera.cx), view.v = Fma(camera.fy, view.slope_y, camera.cy);
  view.limited_x = Limited(view.slope_x, camera.most_x), view.limited_y = Limited(view.slope_y, camera.most_y);
  view.sx = camera.fx * view.per_z, view.sy = camera.fy * view.per_z;
  view.a = Fma(-view.limited_x, camera.forward, camera.right);
  view.b = Fma(-view.limited_y, camera.forward, camera.down);
  view.w = Cross(view.a, view.b);
}

// The rest of the view, from view.bare.
template <class T, class N>
KNN_FN void Flatten(T eps2d, bool antialiased, View<N>& view) {
  using V = ValueType<N>;
  const Ellipse<N>& e = view.bare;
  const N area = view.sx * view.sy;
  view.ellipse = {view.sx * view.sx * e.xx, area * e.xy, view.sy * view.sy * e.yy, area * (area * e.bare)};
  const N eps = Number<N>::Of(eps2d);
  view.xx = view.ellipse.xx + eps, view.yy = view.ellipse.yy + eps;
  view.det = (view.ellipse.bare + Scale(eps2d, view.ellipse.xx + view.ellipse.yy)) + eps * eps;
  const V x = Abs(ValueOf(view.xx)), y = Abs(ValueOf(view.yy));
  view.unit = InversePower(Select(Greater(x, y), x, y));
  view.per_unit_det = Number<N>::Of(1) / (view.unit * (view.unit * view.det));
  view.conic[0] = view.PerDet(view.yy);
  view.conic[1] = -view.PerDet(view.ellipse.xy);
  view.conic[2] = view.PerDet(view.xx);
  view.ratio = view.PerDet(view.ellipse.bare);
  view.factor = Number<N>::Of(1);
  if (antialiased) {
    const N least = Number<N>::Of(kLeastRatio);
    view.factor = Sqrt(Select(Greater(ValueOf(view.ratio), ValueOf(least)), view.ratio, least));
  }
}

// Whether it is drawn, whatever its colour is.
template <class T, class N>
KNN_FN auto IsSeen(T near, T far, const View<N>& view, N opacity) {
  using V = ValueType<N>;
  V sum = V{};
  const auto add = [&](N a) { sum = sum + (ValueOf(a) - ValueOf(a)); };
  add(view.u), add(view.v), add(view.xx), add(view.ellipse.xy), add(view.yy), add(view.det), add(view.ellipse.bare);
  add(view.conic[0]), add(view.conic[1]), add(view.conic[2]), add(opacity);
  const V z = ValueOf(view.position.z), det = ValueOf(view.det);
  // An eps2d that is 0 leaves what has no area, and a det of 0 no conic that is finite.
  return IsZero(sum) & Greater(z, Number<V>::Of(near)) & Greater(Number<V>::Of(far), z) & !IsZero(det);
}

template <class N>
struct ViewCotangent {
  N u, v, conic[3], opacity, z;
};

// Gradients, all but those in what the ellipse is of.
template <class N>
struct ViewBar {
  Point<N> position, a, b;
  N fx, fy, opacity;
  Point<N> centre;
};

// The gradient in view.bare, and in the opacity, f, z as far as they come before it.
template <class T, class N>
KNN_FN Ellipse<N> PullFlatten(T eps2d, bool antialiased, const Camera<N>& camera, const View<N>& view, N opacity,
                              const ViewCotangent<N>& ct, ViewBar<N>& bar) {
  bar.opacity = ct.opacity * view.factor;
  N ratio_bar = {};
  if (antialiased) {
    const auto moves = Greater(ValueOf(view.ratio), Number<ValueType<N>>::Of(kLeastRatio));
    ratio_bar = Select(moves, ct.opacity * opacity / (view.factor + view.factor), N{});
  }
  const N det_bar =
      -view.PerDet(Fma(ratio_bar, view.ratio,
                       Fma(ct.conic[0], view.conic[0], Fma(ct.conic[1], view.conic[1], ct.conic[2] * view.conic[2]))));
  const N of_both = Scale(eps2d, det_bar);
  const Ellipse<N> e = {view.PerDet(ct.conic[2]) + of_both, -view.PerDet(ct.conic[1]),
                        view.PerDet(ct.conic[0]) + of_both, view.PerDet(ratio_bar) + det_bar};
  const auto twice = [](N a) { return a + a; };
  const N shared = Fma(view.ellipse.xy, e.xy, twice(view.ellipse.bare * e.bare));
  const N hx = shared + twice(view.ellipse.xx * e.xx), hy = shared + twice(view.ellipse.yy * e.yy);
  bar.fx = hx / camera.fx, bar.fy = hy / camera.fy;
  bar.position.z = ct.z - (hx + hy) * view.per_z;
  const N area = view.sx * view.sy;
  return {view.sx * view.sx * e.xx, area * e.xy, view.sy * view.sy * e.yy, area * (area * e.bare)};
}

// The rest, from the gradients in a, b, w.
template <class N>
KNN_FN void PullLocate(const Camera<N>& camera, const View<N>& view, const ViewCotangent<N>& ct,
                       const AlongBar<N>& along, ViewBar<N>& bar) {
  bar.a = along.a + Cross(view.b, along.w);
  bar.b = along.b + Cross(along.w, view.a);
  const auto pull = [&](N slope, N most, N f, N u_bar, Point<N> a_bar, N& f_bar) {
    const N limited_bar = -Dot(camera.forward, a_bar);
    const auto above = Greater(ValueOf(slope), ValueOf(most)), below = Greater(-ValueOf(most), ValueOf(slope));
    const N most_bar = Select(above, limited_bar, Select(below, -limited_bar, N{}));
    const N slope_bar = Select(above | below, N{}, limited_bar) + f * u_bar;
    f_bar = f_bar + (Fma(u_bar, slope, -(most_bar * (most / f))));
    return slope_bar * view.per_z;
  };
  bar.position.x = pull(view.slope_x, camera.most_x, camera.fx, ct.u, bar.a, bar.fx);
  bar.position.y = pull(view.slope_y, camera.most_y, camera.fy, ct.v, bar.b, bar.fy);
  bar.position.z = bar.position.z - Fma(bar.position.x, view.slope_x, bar.position.y * view.slope_y);
}

// The gradient in the mean, and, by add(i, gradient), in number i of the camera.
template <class N>
KNN_FN Point<N> PullMean(const Camera<N>& camera, const ViewBar<N>& bar) {
  const Point<N>& p = bar.position;
  return Fma(p.x, camera.right, Fma(p.y, camera.down, Fma(p.z, camera.forward, Point<N>{} - bar.centre)));
}
template <class N, class Add>
KNN_FN void PullCamera(Point<N> mean, const View<N>& view, const ViewCotangent<N>& ct, const ViewBar<N>& bar, int size,
                       Add&& add) {
  const auto point = [&](int i, Point<N> g) { add(i, g.x), add(i + 1, g.y), add(i + 2, g.z); };
  const Point<N>& p = bar.position;
  point(0, Fma(p.x, mean, bar.a));
  point(3, Fma(p.y, mean, bar.b));
  point(6, Fma(p.z, mean, Fma(-view.limited_x, bar.a, Times(-view.limited_y, bar.b))));
  point(9, p);
  add(12, bar.fx), add(13, bar.fy), add(14, ct.u), add(15, ct.v);
  if (size > kCameraSize) point(16, bar.centre);
}

// ---- Colours

// f(m) for the harmonics of a degree; written out, so that arrays of them are registers.
template <class F>
KNN_FN void ForHarmonics(int degree, F&& f) {
  f(0);
  if (degree > 0) f(1), f(2), f(3);
  if (degree > 1) f(4), f(5), f(6), f(7), f(8);
  if (degree > 2) f(9), f(10), f(11), f(12), f(13), f(14), f(15);
}

// In the order and with the signs of Gaussian splatting.
inline constexpr double kH0 = 0.28209479177387814, kH1 = 0.4886025119029199, kH4 = 1.0925484305920792;
inline constexpr double kH6 = 0.31539156525252005, kH8 = 0.5462742152960396, kH9 = 0.5900435899266435;
inline constexpr double kH10 = 2.890611442640554, kH11 = 0.4570457994644658, kH12 = 0.3731763325901154;
inline constexpr double kH14 = 1.445305721320277;

template <class N>
KNN_FN void Harmonics(int degree, Point<N> d, N (&h)[kMostHarmonics]) {
  const N x = d.x, y = d.y, z = d.z, xx = x * x, yy = y * y, zz = z * z;
  h[0] = Number<N>::Of(kH0);
  if (degree > 0) h[1] = Scale(-kH1, y), h[2] = Scale(kH1, z), h[3] = Scale(-kH1, x);
  if (degree > 1) {
    h[4] = Scale(kH4, x * y), h[5] = Scale(-kH4, y * z), h[6] = Scale(kH6, zz + zz - xx - yy);
    h[7] = Scale(-kH4, x * z), h[8] = Scale(kH8, xx - yy);
  }
  if (degree > 2) {
    const N rest = Scale(4, zz) - xx - yy;
    h[9] = Scale(-kH9, y * (Scale(3, xx) - yy)), h[10] = Scale(kH10, x * y * z), h[11] = Scale(-kH11, y * rest);
    h[12] = Scale(kH12, z * (zz + zz - Scale(3, xx + yy))), h[13] = Scale(-kH11, x * rest);
    h[14] = Scale(kH14, z * (xx - yy)), h[15] = Scale(-kH9, x * (xx - Scale(3, yy)));
  }
}

// The gradient in the direction.
template <class N>
KNN_FN Point<N> PullHarmonics(int degree, Point<N> d, const N (&h)[kMostHarmonics]) {
  const N x = d.x, y = d.y, z = d.z;
  Point<N> bar = {};
  if (degree > 0) bar = {Scale(-kH1, h[3]), Scale(-kH1, h[1]), Scale(kH1, h[2])};
  if (degree > 1) {
    const N xy = Scale(kH4, h[4]), yz = Scale(-kH4, h[5]), xz = Scale(-kH4, h[7]);
    const N of_6 = Scale(2 * kH6, h[6]), of_8 = Scale(2 * kH8, h[8]);
    bar.x = bar.x + Fma(y, xy, Fma(z, xz, x * (of_8 - of_6)));
    bar.y = bar.y + Fma(x, xy, Fma(z, yz, -(y * (of_8 + of_6))));
    bar.z = bar.z + Fma(y, yz, Fma(x, xz, z * (of_6 + of_6)));
  }
  if (degree > 2) {
    const N xx = x * x, yy = y * y, zz = z * z, xy = x * y, yz = y * z, zx = z * x, cross = Scale(3, xx - yy);
    const N of_9 = Scale(kH9, h[9]), of_10 = Scale(kH10, h[10]), of_11 = Scale(kH11, h[11]);
    const N of_12 = Scale(kH12, h[12]), of_13 = Scale(kH11, h[13]), of_14 = Scale(kH14, h[14]);
    const N of_15 = Scale(kH9, h[15]);
    const auto twice = [](N a) { return a + a; };
    bar.x = bar.x + (yz * of_10 - cross * of_15) - Scale(6, xy * of_9 + zx * of_12) + twice(xy * of_11 + zx * of_14) -
            (Scale(4, zz) - Scale(3, xx) - yy) * of_13;
    bar.y = bar.y + (zx * of_10 - cross * of_9) + Scale(6, xy * of_15 - yz * of_12) + twice(xy * of_13 - yz * of_14) -
            (Scale(4, zz) - xx - Scale(3, yy)) * of_11;
    bar.z = bar.z + xy * of_10 - Scale(8, yz * of_11 + zx * of_13) + Scale(3, twice(zz) - xx - yy) * of_12 +
            (xx - yy) * of_14;
  }
  return bar;
}

template <class N>
struct Sight {
  Point<N> direction;
  N length;
};
template <class N>
KNN_FN Sight<N> SightOf(Point<N> mean, Point<N> centre) {
  const Point<N> g = mean - centre;
  const N length = Sqrt(Dot(g, g));
  return {{g.x / length, g.y / length, g.z / length}, length};
}
template <class N>
KNN_FN Point<N> PullSight(const Sight<N>& sight, Point<N> bar) {
  const Point<N> across = Fma(-Dot(bar, sight.direction), sight.direction, bar);
  return {across.x / sight.length, across.y / sight.length, across.z / sight.length};
}

// ½ + Σ sh·harmonics, sh(i) being coefficient i of an array (M, 3). It is finite only if all of them are.
template <class N, class Coefficients>
KNN_FN void Colors(int degree, const N (&harmonics)[kMostHarmonics], Coefficients&& sh, N (&color)[3]) {
  for (N& c : color) c = Number<N>::Of(0.5);
  ForHarmonics(degree, [&](int m) {
    for (int c = 0; c < 3; ++c) color[c] = Fma(harmonics[m], sh(3 * m + c), color[c]);
  });
}

// The gradient in the mean, which is that in the centre but for its sign.
template <class N, class Coefficients>
KNN_FN Point<N> PullColors(int degree, const Sight<N>& sight, Coefficients&& sh, const N (&bar)[3]) {
  N harmonics_bar[kMostHarmonics];
  ForHarmonics(degree, [&](int m) {
    harmonics_bar[m] = Fma(sh(3 * m), bar[0], Fma(sh(3 * m + 1), bar[1], sh(3 * m + 2) * bar[2]));
  });
  return PullSight(sight, PullHarmonics(degree, sight.direction, harmonics_bar));
}

// ---- Squares of three standard deviations

KNN_FN float Ceil(float x) { return ::ceilf(x); }
KNN_FN double Ceil(double x) { return ::ceil(x); }
KNN_FN float Truncate(float x) { return ::truncf(x); }
KNN_FN double Truncate(double x) { return ::trunc(x); }

// Columns [reach[0], reach[1]) and rows [reach[2], reach[3]) of tiles; returns the radius in pixels, 0 where these are
// none. All finite.
template <class T>
KNN_FN int ReachOf(const Screen& screen, T u, T v, T xx, T xy, T yy, int32_t (&reach)[4]) {
  const T half = (xx - yy) / 2, gap = half * half + xy * xy;  // mid² − det
  const T largest = (xx + yy) / 2 + Sqrt(gap > T(0.1) ? gap : T(0.1));
  const T r = Ceil(3 * Sqrt(largest > 0 ? largest : T(0)));
  const auto tile = [](T a, int count) {
    const T at = Truncate(a / kTile);
    return at > 0 ? at < count ? static_cast<int32_t>(at) : count : 0;
  };
  u -= T(0.5), v -= T(0.5);
  reach[0] = tile(u - r, TileColumns(screen)), reach[1] = tile(u + r + 15, TileColumns(screen));
  reach[2] = tile(v - r, TileRows(screen)), reach[3] = tile(v + r + 15, TileRows(screen));
  constexpr T kMost = 1 << 30;
  return reach[0] < reach[1] && reach[2] < reach[3] ? static_cast<int>(r < kMost ? r : kMost) : 0;
}

}  // namespace knn::KNN_ISA

#endif  // JKA_SPLAT_PROJECT_FORMULAS_H_
