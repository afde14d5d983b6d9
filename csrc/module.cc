// The Python extension module: a table of FFI handlers, and how they were built.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>

#include "common/bind.h"
#include "common/cpu.h"

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

}  // namespace

NB_MODULE(_ext, m) {
  m.def("registrations", &Registrations, "FFI handlers as capsules, by platform and target name.");
  m.def("build_info", &BuildInfo, "How this module was built.");
  m.def(
      "ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "The XLA FFI version, (major, minor), of the headers that this module was built against.");
}
