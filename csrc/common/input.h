// An operand with its tangent, for kernels written once over numbers and dual numbers.

#ifndef JKA_COMMON_INPUT_H_
#define JKA_COMMON_INPUT_H_

#include <type_traits>

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

// An input at one batch entry: element i as N, a number or dual number of the type that S widens to.
template <class N, class S>
class Row {
  using T = decltype(Widen(S(), Stored()));

 public:
  KNN_FN Row(const Input<S>& input, const Batch& batch, int64_t b, Stored stored = Stored::whole)
      : value_(AtOrNull(input.value, batch, b)), tangent_(AtOrNull(input.tangent, batch, b)), stored_(stored) {}

  KNN_FN bool given() const { return value_ != nullptr; }

  KNN_FN N operator[](int64_t i) const {
    if constexpr (std::is_same_v<N, T>) {
      return Widen(value_[i], stored_);
    } else {
      return {Widen(value_[i], stored_), tangent_ == nullptr ? T(0) : Widen(tangent_[i], stored_)};
    }
  }

 private:
  const S *value_, *tangent_;
  Stored stored_;
};

}  // namespace knn::KNN_ISA

#endif  // JKA_COMMON_INPUT_H_
