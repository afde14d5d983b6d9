// The distortion loss of a ray and its derivatives.
//
// For weights w, positions m in ascending order and interval widths Δ (Barron et al., Mip-NeRF 360, 2022, eq. 15):
//
//   L = ⅓ Σ_i Δ_i w_i² + Σ_ij w_i w_j |m_i − m_j|
//
// Of each sample the kernels need four sums, over the samples on either side of it:
//
//   mass    C_i = Σ_{j<i} w_j                    C'_i = Σ_{j>i} w_j
//   moment  A_i = Σ_{j<i} w_j (m_i − m_j)        A'_i = Σ_{j>i} w_j (m_j − m_i)
//
// All are running sums, moments of the gaps between neighbours:  A_i = A_{i−1} + (m_i − m_{i−1}) C_i,  and A' its
// mirror image. No term is negative where no w is, and only differences of neighbouring m occur: nothing cancels,
// wherever the origin of m is. (Moments about the origin, m_i C_i − Σ_{j<i} w_j m_j, lose all digits of a narrow ray
// far away; and so does C' taken as the total minus C.) Then, with cotangent 1,
//
//   L = Σ_i (⅓ Δ_i w_i² + 2 w_i A_i)
//   w̄_i = ⅔ Δ_i w_i + 2 (A_i + A'_i)      m̄_i = 2 w_i (C_i − C'_i)      Δ̄_i = ⅓ w_i²
//
// where m̄ takes equal positions in the order in which they come: it is the derivative from one of two sides.
//
// Second order. L is a scalar, so its Jacobian's transpose is a gradient, whose Jacobian, the Hessian, is symmetric:
// the gradient of ⟨c, J v⟩ in the inputs is c H v, the derivative of c (w̄, m̄, Δ̄) along v, and that in c is J v, the
// derivative of L along v. Both are these formulas in dual numbers. Where c moves along ċ as well, c (w̄, m̄, Δ̄) is the
// product of two dual numbers. But w̄ is linear in w: its derivative along w alone is w̄ at v_w, for which no dual
// numbers are needed.

#ifndef JKA_DISTORTION_FORMULAS_H_
#define JKA_DISTORTION_FORMULAS_H_

#include "common/dual.h"

namespace knn::KNN_ISA {

// Of the samples on one side of a sample. N is a number, a vector or a dual number of either.
template <class N>
struct Side {
  N mass, moment;
};

// Everything below is half of what it is named after: callers have a factor for the sum of all parts anyway.

// What a sample adds to L.
template <class N>
KNN_FN N HalfLoss(N w, N interval, Side<N> left) {
  return w * (Scale(1. / 6, interval) * w + left.moment);
}

// Gradients, as the parts that sweeps from either end can give without the other.
template <class N>
KNN_FN N HalfWeightBar(N w, N interval, Side<N> left) {
  return Scale(1. / 3, interval) * w + left.moment;
}
template <class N>
KNN_FN N HalfWeightBarFromRight(Side<N> right) {
  return right.moment;
}
template <class N>
KNN_FN N HalfPositionBar(N w, Side<N> left) {
  return w * left.mass;
}
template <class N>
KNN_FN N HalfPositionBarFromRight(N w, Side<N> right) {
  return Scale(-1, w * right.mass);
}
template <class N>
KNN_FN N HalfIntervalBar(N w) {
  return Scale(1. / 6, w * w);
}

// The first index in [0, n] from which `ascending` is not below `key`. For arrays that are not ascending, some index,
// which still does not decrease with the key: the larger key turns left only where the smaller one does.
KNN_FN int64_t LowerBound(const int32_t* ascending, int64_t n, int32_t key) {
  int64_t low = 0;
  while (low < n) {
    const int64_t middle = (low + n) / 2;
    if (ascending[middle] < key) {
      low = middle + 1;
    } else {
      n = middle;
    }
  }
  return low;
}

}  // namespace knn::KNN_ISA

#endif  // JKA_DISTORTION_FORMULAS_H_
