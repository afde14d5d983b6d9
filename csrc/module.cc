// The Python extension module: a table of FFI handlers, and how they were built.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "common/bind.h"
#include "common/cpu.h"
#include "distortion/distortion.h"
#include "hash_grid/hash_grid.h"
#include "knn/aggregate/aggregate.h"
#include "knn/index/index.h"
#include "knn/invert/invert.h"
#include "knn/search/search.h"
#include "mlp/mlp.h"
#include "splat/splat.h"
#ifdef KNN_CUDA
#include "mlp/cuda.h"
#endif

namespace nb = nanobind;

namespace knn {

// Of each room's FFI files.
std::vector<Registration> IndexRegistrations();
std::vector<Registration> SearchRegistrations();
std::vector<Registration> AggregateRegistrations();
std::vector<Registration> InvertRegistrations();
std::vector<Registration> DistortionRegistrations();
std::vector<Registration> HashGridRegistrations();
std::vector<Registration> MlpRegistrations();
std::vector<Registration> SplatRegistrations();
std::vector<Registration> ProjectionRegistrations();

}  // namespace knn

namespace {

nb::dict Registrations() {
  nb::dict platforms;
  for (const auto& list : {knn::IndexRegistrations(), knn::SearchRegistrations(), knn::AggregateRegistrations(),
                           knn::InvertRegistrations(), knn::DistortionRegistrations(), knn::HashGridRegistrations(),
                           knn::MlpRegistrations(), knn::SplatRegistrations(), knn::ProjectionRegistrations()}) {
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

// Sizes, limits and layouts that Python asks for, since it allocates what kernels read and write.
nb::dict Numbers() {
  nb::dict n;
  n["batch_axes"] = knn::kMaxBatchAxes;
  n["hash_grid.max_levels"] = knn::kMaxGridLevels;
  n["cuda.pairs_of_thread"] = knn::kPairsOfThread;
  n["cuda.grid_sum_bytes"] = knn::kSumBytes;
  n["cuda.grid_unit_bytes"] = knn::kUnitBytes;
  n["mlp.max_layers"] = knn::kMaxLayers;
  n["mlp.max_parts"] = knn::kMaxParts;
  n["cpu.mlp_max_width"] = knn::kMlpCpuMaxWidth;
  n["cuda.mlp_max_width"] = knn::kMlpCudaMaxWidth;
  n["index.leaf"] = knn::kLeafSize;
  n["index.fan_out"] = knn::kFanOut;
  n["index.node_rows"] = static_cast<int>(knn::kNodeRows);
  n["index.base"] = static_cast<int>(knn::kBase);
  n["cuda.sort_bytes"] = knn::kSortBytes;
  n["cuda.index_bytes_of_point"] = knn::kIndexBytesOfPoint;
  n["cuda.index_bytes_of_cloud"] = knn::kExtentsBytes;
  n["cuda.search_bytes_of_query"] = knn::kSearchBytesOfQuery;
  n["cuda.filter_bytes_of_point"] = knn::kFilterBytesOfPoint;
  n["cuda.filter_bytes_of_cloud"] = knn::kFilterBytesOfCloud;
  n["cuda.search_max_K"] = knn::kCudaMaxK;
  n["cuda.filter_max_K"] = knn::kFilterMaxK;
  n["cuda.invert_bytes_of_pair"] = knn::kInvertBytesOfPair;
  n["cuda.invert_max_counted"] = knn::kMaxCounted;
  n["cuda.invert_tile"] = knn::kCountedTile;
  n["cuda.piece_pairs"] = knn::kPiecePairs;
  n["cuda.piece_terms"] = knn::kPieceTerms;
  n["cuda.tile_bytes"] = knn::kTileBytes;
  n["cuda.right_sums"] = knn::kRightSums;
  n["cuda.tiles_bytes_of_item"] = knn::kTilesBytesOfItem;
  n["cuda.warp"] = 32;
  return n;
}

}  // namespace

NB_MODULE(_ext, m) {
  m.def("registrations", &Registrations, "FFI handlers as capsules, by platform and target name.");
  m.def("numbers", &Numbers, "Sizes, limits and layouts of kernels, by name.");
  m.def(
      "filter_error", [] { return nb::make_tuple(knn::kFilterError, knn::kFilterUnderflow); },
      "The error bound of csrc/knn/search/cuda_filter.cu, for its test.");
  m.def(
      "mlp_cuda_scratch_bytes",
      [](const std::vector<int64_t>& widths, int64_t bytes, int64_t sum_entries) {
        return knn::MlpCudaScratchBytes(widths.data(), static_cast<int>(widths.size()) - 1, bytes, sum_entries);
      },
      "See csrc/mlp/mlp.h.");
  m.def(
      "mlp_cuda_serves",
      [](const std::vector<int64_t>& widths, int64_t bytes) {
#ifdef KNN_CUDA
        return knn::MlpCudaServes(widths.data(), static_cast<int>(widths.size()) - 1, bytes);
#else
        return false;
#endif
      },
      "See csrc/mlp/cuda.h.");
  m.def("build_info", &BuildInfo, "How this module was built.");
  m.def(
      "ffi_api_version", [] { return nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR); },
      "The XLA FFI version, (major, minor), of the headers that this module was built against.");
}
