// How much a Gaussian covers of a pixel, how pixels are blended and what that is differentiated, and in which tiles a
// Gaussian counts. Written over N: a number, a SIMD vector, or a dual number of either.
//
// With d = mean − pixel centre and the conic (a, b, c),
//
//     q = −(½ a dx² + b dx dy + ½ c dy²),   raw = o e^q,   α = min(0.99, raw),   0 where q > 0 or raw < 1/255.
//
// A pixel has transmittance T = 1 in front of the first Gaussian and (1 − α) T behind one. Where that would come under
// 1e-4 the pixel ends, before the Gaussian. With weights w = α T, channels c and what is left at the end, T_end,
//
//     image = Σ w c + T_end background,   alpha = 1 − T_end.
//
// Backward, g being the cotangent of the image at the pixel, g_α that of alpha, u = ⟨c, g⟩: everything behind a
// Gaussian has the factor 1 − α, so that with B = Σ_{behind} w u + T_end (⟨background, g⟩ − g_α)
//
//     c̄ = w g,   ᾱ = T u − B / (1 − α) = (T_behind u − B) / (1 − α),   q̄ = raw ᾱ (0 where α saturates),
//
// T_behind = (1 − α) T. Going back to front, T and B follow from what is behind. Over the pixels q̄ is summed with the
// monomials of d; the rest is linear in these sums:
//
//     ō = Σ q̄ / o,   mean̄ = −(a Σ q̄ dx + b Σ q̄ dy, b Σ q̄ dx + c Σ q̄ dy),   conic̄ = −(½ Σ q̄ dx², Σ q̄ dx dy, ½ Σ q̄ dy²).

#ifndef JKA_SPLAT_FORMULAS_H_
#define JKA_SPLAT_FORMULAS_H_

#include <math.h>

#include "common/dual.h"
#include "splat/splat.h"

namespace knn::KNN_ISA {

inline constexpr double kMostAlpha = 0.99, kLeastAlpha = 1.0 / 255, kLeastThrough = 1e-4;

// A cotangent at one batch entry as N; its value or its tangent may be missing, and is zero then.
template <class N, class T>
class Cotangent {
 public:
  KNN_FN Cotangent(const Input<T>& input, const Batch& batch, int64_t b)
      : value_(AtOrNull(input.value, batch, b)), tangent_(AtOrNull(input.tangent, batch, b)) {}

  KNN_FN bool given() const { return value_ != nullptr || tangent_ != nullptr; }
  KNN_FN N operator[](int64_t i) const {
    const T value = value_ == nullptr ? T(0) : value_[i];
    if constexpr (std::is_same_v<N, T>) {
      return value;
    } else {
      return {value, tangent_ == nullptr ? T(0) : tangent_[i]};
    }
  }

 private:
  const T *value_, *tangent_;
};

// A Gaussian in the plane.
template <class N>
struct Flat {
  N x, y, half_a, b, half_c, opacity;
};

// q at d = (dx, dy), of which what depends on dy alone is given: b dy and ½ c dy².
template <class N>
KNN_FN N Exponent(const Flat<N>& g, N dx, N b_dy, N c_dy) {
  return -Fma(dx, Fma(g.half_a, dx, b_dy), c_dy);
}

// Sums over pixels of q̄ times 1, dx, dy, dx², dx dy, dy².
inline constexpr int kMoments = 6;

// What they make of gradients: in the mean (2), the conic (3), the opacity.
template <class N>
KNN_FN void FromMoments(const Flat<N>& g, const N (&m)[kMoments], N (&bar)[kMoments]) {
  const N a_x = g.half_a * m[1], c_y = g.half_c * m[2];
  bar[0] = -Fma(g.b, m[2], a_x + a_x);
  bar[1] = -Fma(g.b, m[1], c_y + c_y);
  bar[2] = Scale(-0.5, m[3]);
  bar[3] = -m[4];
  bar[4] = Scale(-0.5, m[5]);
  bar[5] = m[0] / g.opacity;
}

// ---- In which tiles and pixels a Gaussian may count. T is a number.
//
// raw >= 1/255 means −q <= ln(255 o) = m: an ellipse of d where the conic is positive definite. With the determinant
// D = a c − b²,
//
//     |dx| <= X = √(2 c m / D), reached at dy = −b X / c,  and |dy| <= Y = √(2 a m / D);  at some dy
//     dx = (−b dy ± √(2 a m − D dy²)) / a,  concave (+) and convex (−) functions of dy,
//
// so that over an interval of dy each is greatest, or least, where dy is next to where it is so without bounds. What is
// rounded, here and where q is computed, is far below eight units in the last place of the largest product, by which m
// is increased, so that nothing that counts is ruled out.
template <class T>
struct Footprint {
  T x, y;                 // the mean
  T half_x, half_y;       // X and Y; infinite where there is no ellipse, and anything in the tiles below may count
  T lean;                 // −b X / c
  T b, a_m, det, over_a;  // b, 2 a m, D, 1 / a
  int x0, x1, y0, y1;     // no tile outside of these columns and rows

  KNN_FN bool empty() const { return x0 >= x1 || y0 >= y1; }
};

KNN_FN float Log(float x) { return ::logf(x); }
KNN_FN double Log(double x) { return ::log(x); }
KNN_FN float Sqrt(float x) { return ::sqrtf(x); }
KNN_FN double Sqrt(double x) { return ::sqrt(x); }

// a c − b² to a few units in the last place, whatever cancels.
template <class T>
KNN_FN T Determinant(T a, T b, T c) {
  const T square = b * b, lost = FusedFma(-b, b, square);
  return FusedFma(a, c, -square) + lost;
}

// Tiles [from, to) of `count` with pixels whose distance before the mean, at x, is in [low, high].
template <class T>
KNN_FN void TileRange(T x, T low, T high, int count, int& from, int& to) {
  const T slack = T(0.51) + 2 * Precision<T>::kEpsilon * (Abs(x) + Abs(low) + Abs(high));
  const T first = Floor((x - high - slack) / kTile), last = Floor((x - low - 1 + slack) / kTile) + 1;
  from = first > 0 ? (first < count ? static_cast<int>(first) : count) : 0;
  to = last < count ? (last > 0 ? static_cast<int>(last) : 0) : count;
}

// `reach` limits it to tiles in columns [reach[0], reach[1]) and rows [reach[2], reach[3]); null does not.
template <class T>
KNN_FN Footprint<T> FootprintOf(const Screen& screen, const T* mean, const T* conic, T opacity, const int32_t* reach) {
  const T a = conic[0], b = conic[1], c = conic[2];
  const T everywhere = static_cast<T>(INFINITY);
  Footprint<T> f = {mean[0], mean[1], everywhere, everywhere, 0, b, 0, 0, 0, 0, 0, 0, 0};
  const T sum = (f.x - f.x) + (f.y - f.y) + (a - a) + (b - b) + (c - c);
  if (!(opacity >= static_cast<T>(kLeastAlpha)) || sum != 0) return f;  // what is not finite covers nothing
  f.x1 = TileColumns(screen), f.y1 = TileRows(screen);
  const T det = Determinant(a, b, c);
  if (a > 0 && c > 0 && det > Precision<T>::kLeast / Precision<T>::kEpsilon) {  // and no product underflows
    T m = Log(255 * opacity) + T(1e-3);
    const T x2 = 2 * c / det, y2 = 2 * a / det;
    const T x = Sqrt(2 * (m + 1) * x2), y = Sqrt(2 * (m + 1) * y2);
    m += 8 * Precision<T>::kEpsilon * (a * x * x / 2 + Abs(b) * x * y + c * y * y / 2);
    const T half_x = Sqrt(m * x2) * T(1.0001), half_y = Sqrt(m * y2) * T(1.0001), a_m = 2 * a * m;
    if (half_x < Precision<T>::kMost && half_y < Precision<T>::kMost && a_m < Precision<T>::kMost) {
      f.half_x = half_x, f.half_y = half_y, f.lean = -b * half_x / c, f.a_m = a_m, f.det = det, f.over_a = 1 / a;
      TileRange(f.x, -half_x, half_x, f.x1, f.x0, f.x1);
      TileRange(f.y, -half_y, half_y, f.y1, f.y0, f.y1);
    }
  }
  if (reach != nullptr) {
    f.x0 = reach[0] > f.x0 ? reach[0] : f.x0, f.x1 = reach[1] < f.x1 ? reach[1] : f.x1;
    f.y0 = reach[2] > f.y0 ? reach[2] : f.y0, f.y1 = reach[3] < f.y1 ? reach[3] : f.y1;
  }
  return f;
}

// An interval; none where low > high.
template <class T>
struct Span {
  T low, high;
};

// dx where it may count at some dy of `rows`.
template <class T>
KNN_FN Span<T> SpanOf(const Footprint<T>& f, Span<T> rows) {
  if (!(f.half_x <= Precision<T>::kMost)) return {-f.half_x, f.half_x};
  if (rows.low > f.half_y || rows.high < -f.half_y) return {1, 0};
  const auto clamp = [&](T dy) { return dy < rows.low ? rows.low : dy > rows.high ? rows.high : dy; };
  const auto half = [&](T dy) {
    const T square = f.a_m - f.det * dy * dy;
    return square > 0 ? Sqrt(square) : T(0);
  };
  const T right = clamp(f.lean), left = clamp(-f.lean), slack = T(1e-4) * f.half_x;
  return {(-f.b * left - half(left)) * f.over_a - slack, (-f.b * right + half(right)) * f.over_a + slack};
}

// From the mean at x back to the centres of pixels [begin, end).
template <class T>
KNN_FN Span<T> BackTo(T x, int begin, int end) {
  return {x - (static_cast<T>(end) - T(0.5)), x - (static_cast<T>(begin) + T(0.5))};
}

// Columns of tiles in a row of those that it may count in.
struct Columns {
  int from, to;
};
template <class T>
KNN_FN Columns ColumnsOf(const Footprint<T>& f, const Screen& screen, int row) {
  const Span<T> span = SpanOf(f, BackTo(f.y, row * kTile, (row + 1) * kTile));
  Columns columns = {0, 0};
  if (span.low > span.high) return columns;
  TileRange(f.x, span.low, span.high, TileColumns(screen), columns.from, columns.to);
  if (columns.from < f.x0) columns.from = f.x0;
  if (columns.to > f.x1) columns.to = f.x1;
  if (columns.to < columns.from) columns.to = columns.from;
  return columns;
}

}  // namespace knn::KNN_ISA

#endif  // JKA_SPLAT_FORMULAS_H_
