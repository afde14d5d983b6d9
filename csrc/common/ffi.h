// Reads a handler's buffers: checks dtypes and shapes, works out batch axes and strides. Knows XLA and no maths.

#ifndef JKA_COMMON_FFI_H_
#define JKA_COMMON_FFI_H_

#include <initializer_list>
#include <string>
#include <vector>

#include "common/batch.h"
#include "xla/ffi/api/ffi.h"

namespace knn {

namespace ffi = xla::ffi;

template <class T>
inline constexpr ffi::DataType kDataType = ffi::DataType::INVALID;
template <>
inline constexpr ffi::DataType kDataType<float> = ffi::DataType::F32;
template <>
inline constexpr ffi::DataType kDataType<double> = ffi::DataType::F64;
template <>
inline constexpr ffi::DataType kDataType<BFloat16> = ffi::DataType::BF16;
template <>
inline constexpr ffi::DataType kDataType<Half> = ffi::DataType::F16;
template <>
inline constexpr ffi::DataType kDataType<int32_t> = ffi::DataType::S32;
template <>
inline constexpr ffi::DataType kDataType<uint8_t> = ffi::DataType::U8;

// Takes operands and results one after another, in the order in which Python passes them. The first mismatch is kept
// and everything after it returns null: check Done() before using what was read.
class Reader {
 public:
  Reader(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, int first_core_ndim) {
    Collect(args, rets);
    FindBatch(first_core_ndim);
  }

  const Batch& batch() const { return batch_; }

  // Core size `axis` of operand i, read ahead.
  int64_t Size(size_t i, int axis) {
    if (i >= args_.size() || batch_.ndim + axis >= static_cast<int>(args_[i].dimensions().size())) {
      Fail("operand " + std::to_string(i) + " is missing or lacks axes");
      return 0;
    }
    return args_[i].dimensions()[batch_.ndim + axis];
  }

  // Core size `axis` of the operand that comes next.
  int64_t NextSize(int axis) { return Size(next_arg_, axis); }

  ffi::DataType Type(size_t i) const { return i < args_.size() ? args_[i].element_type() : ffi::DataType::INVALID; }

  template <class T>
  Operand<const T> Arg(std::initializer_list<int64_t> core) {
    Operand<const T> operand = {};
    const std::string name = "operand " + std::to_string(next_arg_);
    if (next_arg_ >= args_.size()) return Fail(name + " is missing"), operand;
    const ffi::AnyBuffer& buffer = args_[next_arg_++];
    if (!Check<T>(buffer, core, batch_, /*may_share=*/true, name)) return operand;
    int64_t stride = 1;
    for (int64_t n : core) stride *= n;
    for (int a = batch_.ndim - 1; a >= 0; --a) {
      const int64_t size = buffer.dimensions()[a];
      operand.stride[a] = size == 1 ? 0 : stride;
      stride *= size;
    }
    operand.data = static_cast<const T*>(buffer.untyped_data());
    return operand;
  }

  // As Arg where `present`, else null.
  template <class T>
  Operand<const T> ArgIf(bool present, std::initializer_list<int64_t> core) {
    return present ? Arg<T>(core) : Operand<const T>{};
  }

  template <class T>
  T* Ret(const Batch& batch, std::initializer_list<int64_t> core) {
    const std::string name = "result " + std::to_string(next_ret_);
    if (next_ret_ >= rets_.size()) return Fail(name + " is missing"), nullptr;
    ffi::AnyBuffer& buffer = rets_[next_ret_++];
    if (!Check<T>(buffer, core, batch, /*may_share=*/false, name)) return nullptr;
    // A result without elements may have no memory; null would read as "not wanted", which comes to the same.
    return static_cast<T*>(buffer.untyped_data());
  }

  template <class T>
  T* RetIf(bool wanted, const Batch& batch, std::initializer_list<int64_t> core) {
    return wanted ? Ret<T>(batch, core) : nullptr;
  }

  // The batch shape of result i, read ahead: axes of full size, or 1 where the result is summed over the axis.
  Batch RetBatch(size_t i) {
    Batch batch = batch_;
    if (i >= rets_.size() || static_cast<int>(rets_[i].dimensions().size()) < batch_.ndim) {
      Fail("result " + std::to_string(i) + " is missing or lacks batch axes");
      return batch;
    }
    for (int a = 0; a < batch_.ndim; ++a) batch.size[a] = rets_[i].dimensions()[a];
    for (int a = 0; a < batch_.ndim; ++a) {
      if (batch.size[a] != 1 && batch.size[a] != batch_.size[a])
        Fail("result " + std::to_string(i) + " has a wrong batch size");
    }
    return batch;
  }

  // Core size `axis` of result i, read ahead.
  int64_t RetSize(size_t i, int axis) {
    if (i >= rets_.size() || batch_.ndim + axis >= static_cast<int>(rets_[i].dimensions().size())) {
      Fail("result " + std::to_string(i) + " is missing or lacks axes");
      return 0;
    }
    return rets_[i].dimensions()[batch_.ndim + axis];
  }

  // The number of elements of the next result, whatever its shape.
  int64_t NextRetSize() const {
    return next_ret_ < rets_.size() ? static_cast<int64_t>(rets_[next_ret_].element_count()) : 0;
  }

  void Fail(const std::string& message) {
    if (error_.empty()) error_ = "jax_knn_aggregate: " + message;
  }

  // Of what the CUDA kernels number in 32 bits.
  void CheckCount(int64_t core, const std::string& what) {
    if (KNN_ISA::Count(batch_) * core >= int64_t{1} << 31) Fail("the CUDA kernels need " + what + " < 2^31");
  }

  // Success if everything was there, was right, and nothing is left over.
  ffi::Error Done() {
    if (next_arg_ != args_.size())
      Fail("got " + std::to_string(args_.size()) + " operands, expected " + std::to_string(next_arg_));
    if (next_ret_ != rets_.size())
      Fail("got " + std::to_string(rets_.size()) + " results, expected " + std::to_string(next_ret_));
    return error_.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(error_);
  }

 private:
  void Collect(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets) {
    for (size_t i = 0; i < args.size(); ++i) {
      auto buffer = args.get<ffi::AnyBuffer>(i);
      if (!buffer) return Fail(buffer.error().message());
      args_.push_back(*buffer);
    }
    for (size_t i = 0; i < rets.size(); ++i) {
      auto buffer = rets.get<ffi::AnyBuffer>(i);
      if (!buffer) return Fail(buffer.error().message());
      rets_.push_back(**buffer);
    }
  }

  // Every operand has the same number of batch axes in front of its core axes, each of full size or 1.
  void FindBatch(int first_core_ndim) {
    if (args_.empty()) return Fail("there are no operands");
    const int ndim = static_cast<int>(args_[0].dimensions().size()) - first_core_ndim;
    if (ndim < 0 || ndim > kMaxBatchAxes) {
      return Fail("got " + std::to_string(ndim) + " batch axes, expected 0 to " + std::to_string(kMaxBatchAxes));
    }
    batch_.ndim = ndim;
    for (int a = 0; a < ndim; ++a) {
      batch_.size[a] = 1;
      for (const ffi::AnyBuffer& b : args_) {
        if (static_cast<int>(b.dimensions().size()) < ndim) return Fail("an operand lacks batch axes");
        if (b.dimensions()[a] != 1) batch_.size[a] = b.dimensions()[a];
      }
    }
  }

  template <class T>
  bool Check(const ffi::AnyBuffer& buffer, std::initializer_list<int64_t> core, const Batch& batch, bool may_share,
             const std::string& name) {
    const auto dims = buffer.dimensions();
    bool ok = buffer.element_type() == kDataType<T> && dims.size() == batch.ndim + core.size();
    for (int a = 0; ok && a < batch.ndim; ++a) {
      ok = dims[a] == batch.size[a] || (may_share && dims[a] == 1);
    }
    int axis = batch.ndim;
    for (int64_t n : core) {
      ok = ok && dims[axis] == n;
      ++axis;
    }
    if (!ok) Fail(name + " has an unexpected dtype or shape");
    return ok;
  }

  std::vector<ffi::AnyBuffer> args_, rets_;
  Batch batch_ = {};
  size_t next_arg_ = 0, next_ret_ = 0;
  std::string error_;
};

}  // namespace knn

#endif  // JKA_COMMON_FFI_H_
