// An operand with its tangent, for kernels written once over numbers and dual numbers.

#ifndef JKA_COMMON_INPUT_H_
#define JKA_COMMON_INPUT_H_

#include "common/batch.h"
#include "common/dual.h"

namespace knn {

// Null data means that it is not given; a tangent is zero then.
template <class T>
struct Input {
  Operand<const T> value, tangent;
};

}  // namespace knn

namespace knn::KNN_ISA {

// An input at one batch entry: element i as N, which is T or Dual<T>.
template <class N, class T>
class Row {
 public:
  KNN_FN Row(const Input<T>& input, const Batch& batch, int64_t b)
      : value_(AtOrNull(input.value, batch, b)), tangent_(AtOrNull(input.tangent, batch, b)) {}

  KNN_FN bool given() const { return value_ != nullptr; }

  KNN_FN N operator[](int64_t i) const {
    if constexpr (sizeof(N) == sizeof(T)) {
      return value_[i];
    } else {
      return {value_[i], tangent_ == nullptr ? T(0) : tangent_[i]};
    }
  }

 private:
  const T *value_, *tangent_;
};

}  // namespace knn::KNN_ISA

#endif  // JKA_COMMON_INPUT_H_
