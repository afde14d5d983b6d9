// Groups pairs by point with a counting sort, one for each set of groups.

#include "knn/invert/cpu.h"

namespace knn::KNN_ISA {
namespace {

int64_t Tasks(const Invert& v) { return Count(v.kept); }

void Run(const Invert& v, void* /*scratch*/, int64_t task) {
  int32_t* offsets = v.offsets + task * (v.P + 1);
  int32_t* order = v.order + task * v.pairs;
  const int64_t rows = v.row == 0 ? 0 : v.pairs / v.row;
  // Pairs without a neighbour form a last group, P, which nobody reads.
  const auto group = [&v](int32_t idx) { return Names(idx, v.P) ? idx : v.P; };

  std::memset(offsets, 0, (v.P + 1) * sizeof *offsets);
  for (int64_t s = 0; s < rows; ++s) {
    const int32_t* idxs = v.idxs + Join(Split(v.batch, v.kept), task, s) * v.row;
    for (int64_t i = 0; i < v.row; ++i) ++offsets[group(idxs[i])];
  }
  int32_t sum = 0;
  for (int64_t j = 0; j <= v.P; ++j) {
    const int32_t n = offsets[j];
    offsets[j] = sum;
    sum += n;
  }
  // Placing a group's pairs moves its offset from its begin to its end, the begin of the next.
  for (int64_t s = 0; s < rows; ++s) {
    const int32_t* idxs = v.idxs + Join(Split(v.batch, v.kept), task, s) * v.row;
    for (int64_t i = 0; i < v.row; ++i) order[offsets[group(idxs[i])]++] = static_cast<int32_t>(s * v.row + i);
  }
  for (int64_t j = v.P; j > 0; --j) offsets[j] = offsets[j - 1];
  offsets[0] = 0;
}

}  // namespace

CpuKernel<Invert> InvertKernel() { return {nullptr, {{&Tasks, &Run}}}; }

}  // namespace knn::KNN_ISA
