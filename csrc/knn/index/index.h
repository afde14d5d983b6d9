// An exact index of a cloud whose points measure distance each in its own metric: what it holds, and why its bounds
// hold.
//
// Points are sorted along a space-filling curve (which one is the builder's choice) and cut into leaves of 32. Leaves
// are the nodes of level 0. 32 consecutive nodes make a group, and group g of a level is what node g of the level above
// contains; the last level has one group. Nothing is stored to tell who contains whom, and what one warp or one SIMD
// loop reads lies together.
//
// A node has a box around its points and says how short distances to it can be. For a query with gap g_a ≥ 0 to the box
// along axis a, every point of the node has
//
//   dist ≥ base + max( Σ_a (lambda g_a)²,  max_a (axis_a g_a)² )                                                  (1)
//
// With M = Rᵀ diag(sigma) R: where all sigma ≥ 0, dist = dᵀMd ≥ λ_min(M) |d|², and along one axis
// dᵀMd ≥ d_a² / (M⁻¹)_aa (the minimum over the other two components, a Schur complement). So lambda² is the smallest
// λ_min of the node's points and axis_a² the smallest 1/(M⁻¹)_aa; factors are kept as square roots so that (1)
// overflows and underflows only where distances do. A point with a negative sigma has no bound: its node's base is
// −inf, which (1) keeps, so it is always visited. Such points sort behind all others and share leaves. A node without
// points has base +inf.
//
// A distance as computed may be less than the exact one. In the sigma-weighted norm ‖u‖² = Σ sigma_i u_i², rounding u
// moves it by at most κ|d| with κ = c ε √tr M (tr M = Σ sigma_i |R_i|²), hence
//
//   √dist_computed ≥ √dist − κ|d| ≥ (√λ_min − κ) |d|   and, as |d| ≤ √dist / √λ_min,   ≥ (1 − κ/√λ_min) √dist.
//
// So lambda is √λ_min − κ and axis_a is (1 − κ/√λ_min) / √(M⁻¹)_aa, or 0 where that is negative; both are then rounded
// down generously. Gaps need no care: rounding is monotone, so a computed gap is never longer than the computed d_a.
//
// Nor are errors relative where numbers underflow. XLA's threads flush: they read and write 0 for all below the least
// normal number m. Three products and two sums of each u_i lose at most 5m, so ‖u‖ at most e = 5m √(Σ sigma_i), and e²
// <= 75 m² · most = 300 m, as the largest number is 4/m. (What a subnormal entry of R or sigma adds is lost too: see
// bounds.h.) Products and sums of the three terms lose at most another 8m; where sigma_i u_i is lost, |u_i| < 1. Hence,
// for any t > 0 and a computed distance x, as squares of sums go,
//
//   bound <= (√(x + 8m) + e)² <= (1 + t) (x + 8m) + (1 + 1/t) e²
//
// and with t = 2⁻¹³, half of what factors are rounded down by, a node is left out only where its bound is more than x +
// 2²² m. (Squared Euclidean distances have no u: 8m would do.)

#ifndef JKA_KNN_INDEX_INDEX_H_
#define JKA_KNN_INDEX_INDEX_H_

#include "common/batch.h"
#include "knn/metric.h"

namespace knn {

inline constexpr int kLeafSize = 32;  // points of a leaf
inline constexpr int kFanOut = 32;    // nodes of a group
inline constexpr int kMaxLevels = 7;  // for 2³¹ points

// Scratch of CUDA kernels that sort by radix: at most a byte an item, and this, for CUB's histograms. Launches check
// that it suffices.
inline constexpr int64_t kSortBytes = 1 << 21;
// Of the CUDA builder: sort keys and indices, twice each, and the sort's byte; and what it finds out about the extent
// of a cloud (cloud.cuh).
inline constexpr int64_t kIndexBytesOfPoint = 2 * (8 + 4) + 1, kExtentsBytes = 64 * 28;

// Rows of a group.
enum NodeRow { kLow = 0, kHigh = 3, kBase = 6, kLambda = 7, kAxis = 8, kNodeRows = 11 };

// Rows of a leaf: p, then sigma and R by rows.
template <MetricKind metric>
inline constexpr int kLeafRows = metric == MetricKind::kAnisotropic ? 15 : 3;

// How many leaves, levels and groups P points make. Level l has nodes 0..nodes[l] − 1 in groups from first_group[l] on.
struct IndexShape {
  int64_t leaves, groups;
  int levels;
  int64_t nodes[kMaxLevels], first_group[kMaxLevels + 1];

  // How many nodes a group has.
  KNN_FN int64_t NodesIn(int level, int64_t group) const { return nodes[level] - group * kFanOut; }
};

KNN_FN IndexShape ShapeOfIndex(int64_t P) {
  IndexShape shape = {};
  shape.leaves = (P + kLeafSize - 1) / kLeafSize;
  for (int64_t nodes = shape.leaves;;) {
    const int64_t groups = (nodes + kFanOut - 1) / kFanOut;
    shape.nodes[shape.levels] = nodes;
    shape.first_group[shape.levels + 1] = shape.first_group[shape.levels] + groups;
    shape.groups = shape.first_group[++shape.levels];
    if (groups <= 1) return shape;
    nodes = groups;
  }
}

// An index as the search reads it. Batch axes as those of the search's operands. It is an array like any other: stale,
// zero or arbitrary where a program carries a place for one that is yet to be built. Whatever is in it, searches visit
// only nodes that the shape has, and take only points that exist.
template <class T>
struct Index {
  Operand<const T> leaves;       // [leaves, kLeafRows, kLeafSize]; a missing one has p = +inf
  Operand<const int32_t> order;  // [leaves, kLeafSize]: which point this is, −1 for a missing one
  Operand<const T> nodes;        // [groups, kNodeRows, kFanOut]
};

// What the builder takes. Left out are points from `lengths` on, and points with a number that is not finite and no
// negative sigma: their distances are +inf or NaN, and the search finds them without an index in the rare case that it
// needs them.
template <class T>
struct BuildIndex {
  Batch batch;
  int64_t P;

  Operand<const T> p;              // [P, 3]
  Operand<const T> sigma;          // [P, 3]; anisotropic only
  Operand<const T> R;              // [P, 3, 3]; anisotropic only
  Operand<const int32_t> lengths;  // []

  // Results, in full batch, as in Index.
  T* leaves;
  int32_t* order;
  T* nodes;

  // CPU only: leaves points as they come and rules nothing out. For so few queries that order does not pay.
  bool plain;
};

}  // namespace knn

namespace knn::KNN_ISA {

// How much further than the K-th nearest a bound may seem to be.
template <class T>
constexpr T kUnderflow = 0x1p22 * Precision<T>::kLeast;

// How many of the P points of batch entry b exist.
KNN_FN int64_t LengthOf(const Operand<const int32_t>& lengths, const Batch& batch, int64_t b, int64_t P) {
  return Min(Max(int64_t{*At(lengths, batch, b)}, int64_t{0}), P);
}

}  // namespace knn::KNN_ISA

#endif  // JKA_KNN_INDEX_INDEX_H_
