// What the grouping of pairs by point takes; see invert() in jax_knn_aggregate/ops/knn/aggregate.py.

#ifndef JKA_KNN_INVERT_INVERT_H_
#define JKA_KNN_INVERT_INVERT_H_

#include "common/batch.h"

namespace knn {

// On CUDA: points that a counting sort is for, as their counts fit shared memory, and pairs that it counts together.
inline constexpr int64_t kMaxCounted = 8192, kCountedTile = 2048;
// Scratch of the radix sort for more points: keys twice, pair numbers once, and the sort's byte.
inline constexpr int64_t kInvertBytesOfPair = 3 * 4 + 1;

struct Invert {
  Batch batch;    // of idxs
  Batch kept;     // 1 along axes whose pairs fall into the same groups
  int64_t P;      // points a group set
  int64_t pairs;  // in a group set: the product of the sizes not kept, and Q·K
  int64_t row;    // Q·K

  const int32_t* idxs;  // [batch, Q, K]
  int32_t* order;       // [kept, pairs]: pair numbers by (point, number)
  int32_t* offsets;     // [kept, P + 1]
};

}  // namespace knn

#endif  // JKA_KNN_INVERT_INVERT_H_
