// What the kernels of the distortion loss take. T is the type of all floats.

#ifndef JKA_DISTORTION_DISTORTION_H_
#define JKA_DISTORTION_DISTORTION_H_

#include "common/batch.h"

namespace knn {

// One struct serves the value and all derivatives. Operands that are not given, and results that are not asked for, are
// null. Sizes after the batch axes stand behind each array.
template <class T>
struct Distortion {
  Batch batch;
  int64_t N;  // samples of a batch entry
  int64_t R;  // its rays

  Operand<const int32_t> offsets;  // [R + 1]: ray r has samples [offsets[r], offsets[r + 1]); null: R is 1, all N

  Operand<const T> w, m;      // [N]
  Operand<const T> interval;  // [N], or [1] if shared
  bool shared_interval;
  Operand<const T> v_w, v_m, v_interval;  // tangents; null means zero
  Operand<const T> ct;                    // [R], cotangent of the loss; given where a gradient is wanted
  Operand<const T> v_ct;                  // [R], its tangent; only beside others

  // In full batch. With tangents, the derivatives along them; without, either the loss or gradients.
  T* loss;           // [R]
  T *w_bar, *m_bar;  // [N]
  T* interval_bar;   // [N], or [R] if the interval is shared

  T* right_sums;  // [WholeTiles, kRightSums]; scratch, on CUDA alone, where w_bar or m_bar is wanted
};

// Of the CUDA kernel, whose tiles have at least as many bytes of each array. Its scratch is for each whole tile that
// may be there, and holds sums over what is to the right of it.
inline constexpr int kTileBytes = 512, kRightSums = 8;
template <class T>
KNN_FN int64_t WholeTiles(const Distortion<T>& a) {
  return a.N / (kTileBytes / int{sizeof(T)});
}

template <class T>
KNN_FN bool HasTangents(const Distortion<T>& a) {
  return a.v_w.data != nullptr || a.v_m.data != nullptr || a.v_interval.data != nullptr;
}

template <class T>
KNN_FN bool WantsGradients(const Distortion<T>& a) {
  return a.w_bar != nullptr || a.m_bar != nullptr || a.interval_bar != nullptr;
}

// Where each ray's samples begin.
struct RayOffsets {
  Batch batch;
  int64_t N, R;
  Operand<const int32_t> ray_id;  // [N], not decreasing
  int32_t* offsets;               // [R + 1]
};

}  // namespace knn

namespace knn::KNN_ISA {

// Rays of an entry that threads are given to: samples outside all rays have zero gradients, which takes someone to
// write.
template <class T>
KNN_FN int64_t Rows(const Distortion<T>& a) {
  return a.R > 0 ? a.R : 1;
}

}  // namespace knn::KNN_ISA

#endif  // JKA_DISTORTION_DISTORTION_H_
