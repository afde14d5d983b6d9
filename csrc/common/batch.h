// Leading batch axes, each of full size or of size 1 (shared, stride 0). The Python side is core/batch.py.

#ifndef JKA_COMMON_BATCH_H_
#define JKA_COMMON_BATCH_H_

#include "common/numeric.h"

namespace knn {

// Axes come merged, so that two or three are usual however deeply vmaps are nested.
inline constexpr int kMaxBatchAxes = 6;

struct Batch {
  int ndim;
  int64_t size[kMaxBatchAxes];
};

// An array with batch axes in front. stride counts elements per step along each axis, 0 where the array is shared.
template <class T>
struct Operand {
  T* data;
  int64_t stride[kMaxBatchAxes];
};

}  // namespace knn

namespace knn::KNN_ISA {

KNN_FN int64_t Count(const Batch& batch) {
  int64_t n = 1;
  for (int a = 0; a < batch.ndim; ++a) n *= batch.size[a];
  return n;
}

// The array of batch entry b, which counts row-major over `batch`.
template <class T>
KNN_FN T* At(const Operand<T>& operand, const Batch& batch, int64_t b) {
  // There are fewer than 2³² entries, and on a GPU the code of wider divisions would fill the instruction cache.
  uint32_t entry = static_cast<uint32_t>(b);
  int64_t offset = 0;
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (int a = batch.ndim - 1; a > 0; --a) {
    const uint32_t size = static_cast<uint32_t>(batch.size[a]), rest = entry / size;
    offset += (entry - rest * size) * operand.stride[a];
    entry = rest;
  }
  offset += entry * operand.stride[0];
  return operand.data + offset;
}

template <class T>
KNN_FN T* AtOrNull(const Operand<T>& operand, const Batch& batch, int64_t b) {
  return operand.data == nullptr ? nullptr : At(operand, batch, b);
}

// Some batch axes are kept and some summed: an index over the kept ones and one over the summed ones, both row-major,
// give the index over all.
struct SplitBatch {
  int ndim;
  int64_t size[kMaxBatchAxes];
  bool summed[kMaxBatchAxes];
};

KNN_FN SplitBatch Split(const Batch& batch, const Batch& kept) {
  SplitBatch split = {};
  split.ndim = batch.ndim;
  for (int a = 0; a < batch.ndim; ++a) {
    split.size[a] = batch.size[a];
    split.summed[a] = kept.size[a] != batch.size[a];
  }
  return split;
}

// Short code, since it is inlined often: 32 bits are enough for entries.
KNN_FN uint32_t Join(const SplitBatch& split, uint32_t c, uint32_t s) {
  uint32_t b = 0, step = 1;
#ifdef __CUDACC__
#pragma unroll 1
#endif
  for (int a = split.ndim - 1; a >= 0; --a) {
    const uint32_t n = static_cast<uint32_t>(split.size[a]), from = split.summed[a] ? s : c, rest = from / n;
    b += (from - rest * n) * step;
    (split.summed[a] ? s : c) = rest;
    step *= n;
  }
  return b;
}

// `part` is `batch` with some axes of size 1: the entry of `part` that entry b of `batch` falls on.
KNN_FN int64_t EntryOf(const Batch& part, const Batch& batch, int64_t b) {
  int64_t entry = 0, stride = 1;
  for (int a = batch.ndim - 1; a >= 0; --a) {
    if (part.size[a] > 1) entry += b % batch.size[a] * stride;
    stride *= part.size[a];
    b /= batch.size[a];
  }
  return entry;
}

}  // namespace knn::KNN_ISA

#endif  // JKA_COMMON_BATCH_H_
