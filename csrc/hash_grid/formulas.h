// The hash grid and its derivatives, over numbers and dual numbers.
//
// At one level, with scale a, a point x lies in cell c = ⌊a x + ½⌋ at f = a x + ½ − c, along each of D axes. Along axis
// d let the upper corner weigh s_d = s(f_d) and the lower 1 − s_d, with s(f) = f ("linear") or f²(3 − 2f)
// ("smoothstep"). A corner b ∈ {0, 1}^D has the row r_b of the table, and weighs W_b = Π_d (b_d ? s_d : 1 − s_d):
//
//   y_k = m Σ_b W_b t[r_b, k]                                                     m: how much the level counts
//
// Of ⟨ct, y⟩, with u_b = m Σ_k ct_k t[r_b, k], what the cotangent makes of a corner:
//
//   t̄[r, k] += Σ_{b: r_b = r} W_b m ct_k              x̄_d += a s'(f_d) Σ_b ± Π_{e≠d} (b_e ? s_e : 1 − s_e) u_b
//
// with + where b_d = 1. Over dual numbers, f has the tangent a ẋ, and these give the derivatives along tangents of x, t
// and ct: all that second order needs, as the Hessian of ⟨ct, y⟩ is symmetric.
//
// "nearest" has one corner, b = 0, of weight 1 and without derivative in x.
//
// (Müller et al. 2022, "Instant neural graphics primitives with a multiresolution hash encoding"; rows and scales as
// tiny-cuda-nn has them, so that its tables fit.)

#ifndef JKA_HASH_GRID_FORMULAS_H_
#define JKA_HASH_GRID_FORMULAS_H_

#include "hash_grid/hash_grid.h"

namespace knn::KNN_ISA {

// Whether a coordinate is finite, and its position on all levels. A point of which one is not is NaN, and touches no
// row.
template <class T>
KNN_FN bool Reaches(T x, float most_scale) {
  return Abs(x * static_cast<T>(most_scale)) <= Precision<T>::kMost && Abs(x) <= Precision<T>::kMost;
}

// Where a point lies along one axis of a level.
template <class T>
struct Place {
  uint32_t cell;  // int32 in two's complement
  T fraction;
};

// The fraction is taken from x anew, since the position has lost digits of it.
template <class T>
KNN_FN Place<T> PlaceOf(T x, T scale) {
  constexpr T kEnd = static_cast<T>(0x1p31), kWhole = static_cast<T>(sizeof(T) == 4 ? 0x1p23 : 0x1p52);
  const T position = FusedFma(scale, x, T(0.5)), floor = Floor(position);
  const int32_t cell = floor >= kEnd ? INT32_MAX : floor < -kEnd ? INT32_MIN : static_cast<int32_t>(floor);
  const bool whole = position >= kWhole || position <= -kWhole;  // as all floats from there on
  return {static_cast<uint32_t>(cell), whole ? T(0) : FusedFma(x, scale, T(0.5) - floor)};
}

// Of a cell's corners, bits say on which sides they are, from axis kFirst on: kernels that give either side of axis 0
// to a thread of its own leave that axis out, and count it in `cell`.

// What says in which rows of their level corners lie: the number of each, or its hash.
template <int D, int kFirst = 0, int kCorners>
KNN_FN void FindNumbers(const Level& level, const uint32_t (&cell)[D], uint32_t (&number)[kCorners]) {
  constexpr uint32_t kPrimes[] = {1u, 2654435761u, 805459861u, 3674653429u};
  if (level.hashed) {
    for (int b = 0; b < kCorners; ++b) {
      uint32_t hash = 0;
      for (int d = 0; d < D; ++d) hash ^= (cell[d] + (d < kFirst ? 0 : b >> (d - kFirst) & 1)) * kPrimes[d];
      number[b] = hash;
    }
  } else {
    uint32_t first = 0;
    for (int d = 0; d < D; ++d) first += cell[d] * level.stride[d];
    for (int b = 0; b < kCorners; ++b) {
      number[b] = first;
      for (int d = kFirst; d < D; ++d) number[b] += (b >> (d - kFirst) & 1) * level.stride[d];
    }
  }
}

// The rows: those numbers modulo how many rows there are, which is a power of two where rows are hashed. Other numbers
// are less unless the point lies outside the unit cube, or the level is tiled.
template <int D, int kFirst = 0, int kCorners>
KNN_FN void FindRows(const Level& level, const uint32_t (&cell)[D], uint32_t (&row)[kCorners]) {
  FindNumbers<D, kFirst>(level, cell, row);
  for (int b = 0; b < kCorners; ++b) {
    if (level.hashed) {
      row[b] &= level.rows - 1;
    } else if (row[b] >= level.rows) {
      row[b] %= level.rows;
    }
  }
}

// How much the corners on either side of an axis weigh, and how fast that of the upper one grows with x.
template <class N>
struct Sides {
  N lower, upper, slope;
};

template <class N, class T>
KNN_FN Sides<N> SidesOf(Interpolation interpolation, N f, T scale) {
  const N one = Constant<N>(One(scale));
  if (interpolation == Interpolation::linear) return {one - f, f, Constant<N>(scale)};
  const N upper = f * f * (Constant<N>(3 * One(scale)) - Scale(2, f));
  return {one - upper, upper, (6 * scale) * (f * (one - f))};
}

// W_b of all corners.
template <int D, int kFirst = 0, class N>
KNN_FN void CornerWeights(const Sides<N> (&sides)[D], N (&weight)[1 << (D - kFirst)]) {
  weight[0] = sides[kFirst].lower;
  weight[1] = sides[kFirst].upper;
  for (int d = kFirst + 1; d < D; ++d) {
    for (int b = 0; b < 1 << (d - kFirst); ++b) {
      weight[b + (1 << (d - kFirst))] = weight[b] * sides[d].upper;
      weight[b] = weight[b] * sides[d].lower;
    }
  }
}

// Σ_b W_b u_b, and in difference[d] the same with ± in place of axis d's weights: axis after axis is interpolated away,
// of the values and of their differences along the axes before. Overwrites u.
template <int D, int kFirst = 0, class N>
KNN_FN N Interpolate(const Sides<N> (&sides)[D], N (&u)[1 << (D - kFirst)], N (&difference)[D]) {
  N along[D][1 << (D - 1 - kFirst)];
  for (int d = kFirst; d < D; ++d) {
    const int half = 1 << (D - 1 - d);  // pairs along axis d, which is the lowest bit that is left
    for (int e = kFirst; e < d; ++e) {
      for (int b = 0; b < half; ++b) {
        along[e][b] = sides[d].lower * along[e][2 * b] + sides[d].upper * along[e][2 * b + 1];
      }
    }
    for (int b = 0; b < half; ++b) {
      along[d][b] = u[2 * b + 1] - u[2 * b];
      u[b] = sides[d].lower * u[2 * b] + sides[d].upper * u[2 * b + 1];
    }
  }
  for (int d = kFirst; d < D; ++d) difference[d] = along[d][0];
  return u[0];
}

}  // namespace knn::KNN_ISA

#endif  // JKA_HASH_GRID_FORMULAS_H_
