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

// ---- In which tiles a Gaussian may count. T is a number.
//
// raw >= 1/255 means −q <= ln(255 o). Over the rectangle of a tile's pixel centres −q, which is convex where the conic
// is positive definite, is least where the rectangle contains the mean, or else on one of its two sides that face the
// mean. What is rounded, here and where q is computed, is far below eight units in the last place of the largest
// product, so that nothing that counts is ruled out.
template <class T>
struct Footprint {
  T x, y, half_a, b, half_c, most;  // most: ln(255 o)
  bool definite;                    // else everything in the rectangle of tiles may count
  int x0, x1, y0, y1;               // no tile outside of these columns and rows

  KNN_FN bool empty() const { return x0 >= x1 || y0 >= y1; }
};

// How much −q may be off by, where |dx| <= x and |dy| <= y.
template <class T>
KNN_FN T Slack(const Footprint<T>& f, T x, T y) {
  return T(1e-3) + 8 * Precision<T>::kEpsilon * (f.half_a * x * x + Abs(f.b) * x * y + f.half_c * y * y);
}

KNN_FN float Log(float x) { return ::logf(x); }
KNN_FN double Log(double x) { return ::log(x); }
KNN_FN float Sqrt(float x) { return ::sqrtf(x); }
KNN_FN double Sqrt(double x) { return ::sqrt(x); }

// a c − b² to a few units in the last place, whatever cancels.
template <class T>
KNN_FN T Determinant(T half_a, T b, T half_c) {
  const T square = b * b, lost = FusedFma(-b, b, square);
  return FusedFma(4 * half_a, half_c, -square) + lost;
}

// Tiles [from, to) of `count` that have pixels between low and high.
template <class T>
KNN_FN void TileRange(T low, T high, int count, int& from, int& to) {
  const T first = Floor((low - 1) / kTile), last = Floor(high / kTile) + 1;
  from = first > 0 ? (first < count ? static_cast<int>(first) : count) : 0;
  to = last < count ? (last > 0 ? static_cast<int>(last) : 0) : count;
}

// Everywhere in the image.
template <class T>
KNN_FN Footprint<T> Unbounded(const Screen& screen, const T* mean, const T* conic, T opacity) {
  Footprint<T> f = {mean[0], mean[1], conic[0] / 2, conic[1], conic[2] / 2, 0, false, 0, 0, 0, 0};
  const T sum = (f.x - f.x) + (f.y - f.y) + (f.half_a - f.half_a) + (f.b - f.b) + (f.half_c - f.half_c);
  if (!(opacity >= static_cast<T>(kLeastAlpha)) || sum != 0) return f;  // what is not finite covers nothing
  f.most = Log(255 * opacity);
  f.x1 = TileColumns(screen), f.y1 = TileRows(screen);
  f.definite = f.half_a > 0 && f.half_c > 0 && Determinant(f.half_a, f.b, f.half_c) > 0;
  return f;
}

// How far from the mean it may count along each axis, from dx² <= 2 (c / det) (−q) at any dy; infinity or NaN where
// that overflows.
template <class T>
KNN_FN void HalfSizes(const Footprint<T>& f, T& x, T& y) {
  const T determinant = Determinant(f.half_a, f.b, f.half_c);
  const T x2 = 4 * f.half_c / determinant, y2 = 4 * f.half_a / determinant, wide = 2 * (f.most + 1);
  const T most = f.most + Slack(f, Sqrt(wide * x2), Sqrt(wide * y2));
  x = Sqrt(most * x2) * T(1.0001), y = Sqrt(most * y2) * T(1.0001);
}

template <class T>
KNN_FN Footprint<T> FootprintOf(const Screen& screen, const T* mean, const T* conic, T opacity, const int32_t* reach) {
  Footprint<T> f = Unbounded(screen, mean, conic, opacity);
  if (f.definite) {
    T x, y;
    HalfSizes(f, x, y);
    if (x < Precision<T>::kMost && y < Precision<T>::kMost) {
      TileRange(f.x - x, f.x + x, TileColumns(screen), f.x0, f.x1);
      TileRange(f.y - y, f.y + y, TileRows(screen), f.y0, f.y1);
    }
  }
  if (reach != nullptr) {
    f.x0 = reach[0] > f.x0 ? reach[0] : f.x0, f.x1 = reach[1] < f.x1 ? reach[1] : f.x1;
    f.y0 = reach[2] > f.y0 ? reach[2] : f.y0, f.y1 = reach[3] < f.y1 ? reach[3] : f.y1;
  }
  return f;
}

// The least ½ a s² + b s t + ½ c t² over t in [low, high].
template <class T>
KNN_FN T LeastAlong(T half_a, T b, T half_c, T s, T low, T high) {
  T t = -b * s / (2 * half_c);
  t = t < low ? low : t > high ? high : t;
  return Fma(s, Fma(half_a, s, b * t), half_c * t * t);
}

// Whether it may count in pixels of columns [left, right) and rows [top, bottom), none of them empty.
template <class T>
KNN_FN bool Touches(const Footprint<T>& f, int left, int right, int top, int bottom) {
  if (!f.definite) return true;
  const T x0 = f.x - (static_cast<T>(right) - T(0.5)), x1 = f.x - (static_cast<T>(left) + T(0.5));
  const T y0 = f.y - (static_cast<T>(bottom) - T(0.5)), y1 = f.y - (static_cast<T>(top) + T(0.5));
  const bool beside = x0 > 0 || x1 < 0, above = y0 > 0 || y1 < 0;
  if (!beside && !above) return true;
  T least = Precision<T>::kMost;
  if (beside) least = LeastAlong(f.half_a, f.b, f.half_c, x0 > 0 ? x0 : x1, y0, y1);
  if (above) {
    const T other = LeastAlong(f.half_c, f.b, f.half_a, y0 > 0 ? y0 : y1, x0, x1);
    least = other < least ? other : least;
  }
  const T x = Abs(x0) > Abs(x1) ? Abs(x0) : Abs(x1), y = Abs(y0) > Abs(y1) ? Abs(y0) : Abs(y1);
  return !(least > f.most + Slack(f, x, y));
}

// Whether it may count in a tile of its rectangle.
template <class T>
KNN_FN bool TouchesTile(const Footprint<T>& f, const Screen& screen, int column, int row) {
  const int left = column * kTile, top = row * kTile, right = left + kTile, bottom = top + kTile;
  return Touches(f, left, right < screen.width ? right : screen.width, top,
                 bottom < screen.height ? bottom : screen.height);
}

}  // namespace knn::KNN_ISA

#endif  // JKA_SPLAT_FORMULAS_H_
