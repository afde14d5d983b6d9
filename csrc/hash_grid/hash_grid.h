// What the kernels of the hash grid take. T is the type of positions and of arithmetic, S that of table and features.

#ifndef JKA_HASH_GRID_HASH_GRID_H_
#define JKA_HASH_GRID_HASH_GRID_H_

#include "common/input.h"

namespace knn {

inline constexpr int kMaxGridLevels = 64, kMaxDim = 4;

// On CUDA: pairs of features that a thread goes through, which are those of one level or of several; how many bytes of
// sums are kept at a time, unless a level needs more; and what is known of each unit.
inline constexpr int kPairsOfThread = 4, kSumBytes = 32 << 20, kUnitBytes = 16;

enum class Interpolation : int32_t { nearest, linear, smoothstep };

// One level: its part of the table is rows [first, first + rows).
struct Level {
  float scale;  // cells per unit of length
  uint32_t first, rows;
  uint32_t stride[kMaxDim];  // by how much a corner's number grows along each axis
  bool hashed;
};

// One struct serves the value and all derivatives. Operands that are not given, and results that are not asked for, are
// null. Sizes after the batch axes stand behind each array.
template <class T, class S>
struct HashGrid {
  Batch batch;
  int64_t N;  // points of a batch entry
  int dim, levels, features;
  uint32_t rows;
  Interpolation interpolation;
  Stored stored;     // the table, and features with it
  float most_scale;  // of the greatest magnitude
  Level level[kMaxGridLevels];

  Input<T> x;                // [N, dim]
  Input<S> table;            // [rows, features]
  Operand<const T> weights;  // [levels]
  Input<S> ct;               // [N, levels·features], where gradients are wanted

  // Given tangents, the derivatives of these along them. In full batch but for table_bar.
  S* y;          // [N, levels·features]
  T* x_bar;      // [N, dim]
  S* table_bar;  // [rows, features], summed over the axes along which table_batch has size 1
  Batch table_batch;
};

template <class T, class S>
KNN_FN bool HasTangents(const HashGrid<T, S>& a) {
  return a.x.tangent.data != nullptr || a.table.tangent.data != nullptr || a.ct.tangent.data != nullptr;
}

}  // namespace knn

namespace knn::KNN_ISA {

// Whole numbers of 64 bits that one sum in the table's gradient takes on CUDA.
template <class T>
inline constexpr int kLimbs = sizeof(T) / 4;

// Levels that a thread goes through on CUDA.
KNN_FN int LevelsOfThread(int features) { return kPairsOfThread / ((features + 1) / 2); }

// The level that follows those, from `begin` on, whose sums are kept at the same time. A unit is a level of one of the
// tables, in the order in which their rows lie in memory.
template <class T, class S>
KNN_FN int64_t GroupEnd(const HashGrid<T, S>& a, int64_t begin) {
  const int64_t units = Count(a.table_batch) * a.levels, most = kSumBytes / (8 * kLimbs<T> * a.features);
  int64_t rows = 0, end = begin;
  while (end < units && end - begin < 65535 && (end == begin || rows + a.level[end % a.levels].rows <= most)) {
    rows += a.level[end++ % a.levels].rows;
  }
  return end;
}

}  // namespace knn::KNN_ISA

#endif  // JKA_HASH_GRID_HASH_GRID_H_
