// What the kernels of the search take.

#ifndef KNN_SEARCH_SEARCH_H_
#define KNN_SEARCH_SEARCH_H_

#include "common/batch.h"
#include "common/metric.h"

namespace knn {

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

  // The result, in full batch, ordered by (distance, index): numbers, +inf, NaN, then −1.
  int32_t* idxs;  // [Q, K]
};

}  // namespace knn

#endif  // KNN_SEARCH_SEARCH_H_
