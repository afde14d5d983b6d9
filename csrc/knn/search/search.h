// What the kernels of the search take.

#ifndef JKA_KNN_SEARCH_SEARCH_H_
#define JKA_KNN_SEARCH_SEARCH_H_

#include "common/batch.h"
#include "knn/index/index.h"
#include "knn/metric.h"

namespace knn {

inline constexpr int kCudaMaxK = 256;   // of the CUDA searches
inline constexpr int kFilterMaxK = 64;  // of cuda_filter.cu

// Scratch of the CUDA searches. Through an index: sort keys and numbers of queries, twice each, and the sort's byte. By
// the filter: what tensor cores read of a point, and what is compared in the end; of a cloud, points that fill the last
// tile, its extent and its frame.
inline constexpr int64_t kSearchBytesOfQuery = 2 * (4 + 4) + 1, kFilterBytesOfPoint = 64 + 64,
                         kFilterBytesOfCloud = 8 * kFilterBytesOfPoint + kExtentsBytes + 32;

// Its error bound, see there: relative to the metric's magnitude, and in units of the scaled polynomial.
inline constexpr double kFilterError = 0x1p-17, kFilterUnderflow = 0x1p-21;

// Sizes after the batch axes stand behind each array.
template <class T>
struct Search {
  Batch batch;
  int64_t Q, P, K;

  Operand<const T> q;              // [Q, 3]
  Operand<const T> p;              // [P, 3]
  Operand<const T> sigma;          // [P, 3]; anisotropic only
  Operand<const T> R;              // [P, 3, 3]; anisotropic only
  Operand<const int32_t> lengths;  // []; points from that index on do not exist

  // On CUDA null data where there is no index: the kernel then compares all pairs.
  Index<T> index;

  // Guesses at neighbours, any integers. Those that name points bound the search radius from the start in the CUDA
  // search through an index with K <= 32; other searches do not read them. Null data and W = 0 where there are none.
  int64_t W;
  Operand<const int32_t> warm;  // [Q, W]

  // The result, in full batch, ordered by (distance, index): numbers, +inf, NaN, then −1.
  int32_t* idxs;  // [Q, K]
};

}  // namespace knn

namespace knn::KNN_ISA {

// The batch axes of `s` along which points vary.
template <class T>
Batch Clouds(const Search<T>& s) {
  Batch clouds = s.batch;
  for (int a = 0; a < clouds.ndim; ++a) {
    const bool shared = s.p.stride[a] == 0 && s.sigma.stride[a] == 0 && s.R.stride[a] == 0 && s.lengths.stride[a] == 0;
    if (shared && clouds.size[a] > 1) clouds.size[a] = 1;
  }
  return clouds;
}

}  // namespace knn::KNN_ISA

#endif  // JKA_KNN_SEARCH_SEARCH_H_
