// Launches every CUDA kernel on small random inputs, for runs under compute-sanitizer. What they compute is compared
// with an oracle by the Python tests; here it must merely be written everywhere.
//
//   nvcc -std=c++17 -DKNN_ISA=cuda -Icsrc csrc/tests/launch_all.cu csrc/*/cuda.cu -o launch_all

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "aggregate/cuda.h"
#include "invert/cuda.h"
#include "search/cuda.h"

using namespace knn;

namespace {

std::mt19937 generator(0);
std::vector<void*> allocations;

void Check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Exactly as large as asked for, so that any access outside is caught.
template <class T>
T* Allocate(int64_t n, const std::vector<T>& values = {}) {
  void* data = nullptr;
  Check(cudaMalloc(&data, n * sizeof(T)), "cudaMalloc");
  allocations.push_back(data);
  if (!values.empty()) Check(cudaMemcpy(data, values.data(), n * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return static_cast<T*>(data);
}

// Random numbers, in full batch or shared. For 16-bit types any bits will do that make small numbers.
template <class T>
Operand<const T> Random(int64_t batch, int64_t n, bool shared) {
  std::uniform_real_distribution<float> uniform(0, 1);
  std::vector<T> values((shared ? 1 : batch) * n);
  for (T& v : values) {
    if constexpr (sizeof(T) == 2) {
      v.bits = static_cast<uint16_t>(0x3000 + generator() % 256);
    } else {
      v = static_cast<T>(uniform(generator));
    }
  }
  return {Allocate(values.size(), values), {shared ? 0 : n}};
}

template <class T, class TF>
void Exercise(MetricKind metric, int64_t Q, int64_t P, int64_t F, int64_t K, bool shared) {
  const int64_t B = 3;
  const bool aniso = metric == MetricKind::kAnisotropic;
  const int64_t sigma = aniso ? 3 : 1;
  const Batch batch = {1, {B}}, kept = {1, {shared ? 1 : B}};

  Search<T> search = {batch, Q, P, K, Random<T>(B, Q * 3, false), Random<T>(B, P * 3, shared)};
  if (aniso) {
    search.sigma = Random<T>(B, P * 3, shared);
    search.R = Random<T>(B, P * 9, shared);
  }
  const int32_t length = static_cast<int32_t>(P - P / 4);  // fewer than K may exist
  search.lengths = {Allocate<int32_t>(1, {length}), {0}};
  search.idxs = Allocate<int32_t>(B * Q * K);
  Check(LaunchSearch(search, metric, nullptr), "search");

  const int64_t sets = shared ? 1 : B, pairs = B / sets * Q * K, bytes = 13 * sets * pairs + (1 << 21);
  Invert invert = {batch, kept, P, pairs, Q * K, search.idxs};
  invert.order = Allocate<int32_t>(sets * pairs);
  invert.offsets = Allocate<int32_t>(sets * (P + 1));
  Check(LaunchInvert(invert, Allocate<uint8_t>(bytes), bytes, nullptr), "invert");

  Aggregate<T, TF> all = {batch, Q, P, F, K, search.q, search.p, Random<TF>(B, P * F, shared)};
  all.sigma = Random<T>(B, P * sigma, shared);
  if (aniso) all.R = search.R;
  all.idxs = {search.idxs, {Q * K}};
  all.ct_f = Random<TF>(B, Q * F, false);
  all.ct_w = Random<T>(B, Q * K, false);
  all.ct_d = Random<T>(B, Q * K, true);
  all.v_q = Random<T>(B, Q * 3, false);
  all.v_p = Random<T>(B, P * 3, shared);
  all.v_f = Random<TF>(B, P * F, shared);
  all.v_sigma = Random<T>(B, P * sigma, shared);
  if (aniso) all.v_R = Random<T>(B, P * 9, shared);
  all.f_out = Allocate<TF>(B * Q * F);
  all.w_out = Allocate<T>(B * Q * K);
  all.dists = Allocate<T>(B * Q * K);
  all.q_bar = Allocate<T>(B * Q * 3);
  all.kept = kept;
  all.p_bar = Allocate<T>(sets * P * 3);
  all.f_bar = Allocate<TF>(sets * P * F);
  all.sigma_bar = Allocate<T>(sets * P * sigma);
  if (aniso) all.R_bar = Allocate<T>(sets * P * 9);
  all.order = {invert.order, {shared ? 0 : pairs}};
  all.offsets = {invert.offsets, {shared ? 0 : P + 1}};
  all.factors = Allocate<PairFactors<T>>(B * Q * K);
  for (auto role : {AggregateRole::kValue, AggregateRole::kJvp, AggregateRole::kVjp, AggregateRole::kVjpVjp}) {
    Check(LaunchAggregate(all, metric, role, nullptr), "aggregate");
    Check(cudaDeviceSynchronize(), "synchronize");
  }
  for (void* data : allocations) Check(cudaFree(data), "cudaFree");
  allocations.clear();
}

}  // namespace

int main() {
  for (MetricKind metric : {MetricKind::kAnisotropic, MetricKind::kIsotropic}) {
    for (bool shared : {false, true}) {
      Exercise<float, float>(metric, 70, 300, 64, 16, shared);
      Exercise<float, float>(metric, 300, 20, 7, 20, shared);  // long lists, fewer than K points
      Exercise<float, BFloat16>(metric, 9, 130, 33, 100, shared);
      Exercise<float, Half>(metric, 9, 600, 64, 256, shared);
      Exercise<double, double>(metric, 33, 257, 65, 40, shared);
    }
  }
  std::puts("all kernels ran");
  return 0;
}
