// The Python extension module: a table of FFI handlers, and how they were built.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "aggregate/aggregate.h"
#include "common/bind.h"
#include "common/cpu.h"
#include "index/index.h"
#include "invert/invert.h"
#include "search/search.h"

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
  numbers["_batch.MAX_BATCH_AXES"] = knn::kMaxBatchAxes;
  numbers["_index._LEAF"] = knn::kLeafSize;
  numbers["_index._FAN_OUT"] = knn::kFanOut;
  numbers["_index._NODE_ROWS"] = static_cast<int>(knn::kNodeRows);
  numbers["_index._BASE"] = static_cast<int>(knn::kBase);
  numbers["_index.CUDA_EXTENTS"] = knn::kExtentsBytes;
  numbers["_search._CUDA_MAX_K"] = knn::kCudaMaxK;
  numbers["_search._CUDA_FILTER_MAX_K"] = knn::kFilterMaxK;
  numbers["_aggregate._PIECE_PAIRS"] = knn::kPiecePairs;
  numbers["_aggregate._PIECE_TERMS"] = knn::kPieceTerms;
  numbers["_aggregate._MAX_COUNTED"] = knn::kMaxCounted;
  numbers["_aggregate._COUNTED_TILE"] = knn::kCountedTile;
  return numbers;
}

}  // namespace

NB_MODULE(_ext, m) {
  m.def("registrations", &Registrations, "FFI handlers as capsules, by platform and target name.");
  m.def("constants", &Constants, "Numbers that stand in Python as well, by module and name there.");
  m.def(
      "filter_error", [] { return nb::make_tuple(knn::kFilterError, knn::kFilterUnderflow); },
      "The error bound of csrc/search/cuda_filter.cu, for its test.");
  m.def("build_info", &BuildInfo, "How this module was built.");
  m.def(
      "ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "The XLA FFI version, (major, minor), of the headers that this module was built against.");
}
