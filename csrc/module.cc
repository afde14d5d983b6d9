// The Python extension module: a table of FFI handlers, and how they were built.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "common/bind.h"
#include "common/cpu.h"
#include "knn/aggregate/aggregate.h"
#include "knn/index/index.h"
#include "knn/invert/invert.h"
#include "knn/search/search.h"

namespace nb = nanobind;

namespace {

nb::dict Registrations() {
  nb::dict platforms;
  for (const auto& list : {knn::IndexRegistrations(), knn::SearchRegistrations(), knn::AggregateRegistrations(),
                           knn::InvertRegistrations(), knn::DistortionRegistrations()}) {
    for (const knn::Registration& r : list) {
      if (!platforms.contains(r.platform)) platforms[r.platform] = nb::dict();
      nb::borrow<nb::dict>(platforms[r.platform])[r.name] = nb::capsule(reinterpret_cast<void*>(r.handler));
    }
  }
  return platforms;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["compiler"] = KNN_COMPILER;
  info["cpu_instruction_sets"] = KNN_CPU_ISAS;
  info["cpu_instruction_set_in_use"] = std::string(knn::IsaName(knn::BestIsa()));
#ifdef KNN_CUDA
  info["cuda_compiler"] = KNN_CUDA_COMPILER;
  info["cuda_architectures"] = KNN_CUDA_ARCHITECTURES;
#endif
  return info;
}

// Numbers that the Python side needs as well, by their names there.
nb::dict Constants() {
  nb::dict numbers;
  numbers["core.batch.MAX_BATCH_AXES"] = knn::kMaxBatchAxes;
  numbers["ops.knn.index._LEAF"] = knn::kLeafSize;
  numbers["ops.knn.index._FAN_OUT"] = knn::kFanOut;
  numbers["ops.knn.index._NODE_ROWS"] = static_cast<int>(knn::kNodeRows);
  numbers["ops.knn.index._BASE"] = static_cast<int>(knn::kBase);
  numbers["ops.knn.index.CUDA_EXTENTS"] = knn::kExtentsBytes;
  numbers["ops.knn.search._CUDA_MAX_K"] = knn::kCudaMaxK;
  numbers["ops.knn.search._CUDA_FILTER_MAX_K"] = knn::kFilterMaxK;
  numbers["ops.knn.aggregate._PIECE_PAIRS"] = knn::kPiecePairs;
  numbers["ops.knn.aggregate._PIECE_TERMS"] = knn::kPieceTerms;
  numbers["ops.knn.aggregate._MAX_COUNTED"] = knn::kMaxCounted;
  numbers["ops.knn.aggregate._COUNTED_TILE"] = knn::kCountedTile;
  return numbers;
}

}  // namespace

NB_MODULE(_ext, m) {
  m.def("registrations", &Registrations, "FFI handlers as capsules, by platform and target name.");
  m.def("constants", &Constants, "Numbers that stand in Python as well, by module and name there.");
  m.def(
      "filter_error", [] { return nb::make_tuple(knn::kFilterError, knn::kFilterUnderflow); },
      "The error bound of csrc/knn/search/cuda_filter.cu, for its test.");
  m.def("build_info", &BuildInfo, "How this module was built.");
  m.def(
      "ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "The XLA FFI version, (major, minor), of the headers that this module was built against.");
}
