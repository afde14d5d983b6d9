// Launches every CUDA kernel on small random inputs, for runs under compute-sanitizer. What they compute is compared
// with an oracle by the Python tests; here it must merely be written everywhere.
//
//   nvcc -std=c++17 -DKNN_ISA=cuda -Icsrc csrc/tests/launch_all.cu $(find csrc -name 'cuda*.cu') -o launch_all

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "distortion/cuda.h"
#include "hash_grid/cuda.h"
#include "knn/aggregate/cuda.h"
#include "knn/index/cuda.h"
#include "knn/invert/cuda.h"
#include "knn/search/cuda.h"
#include "mlp/cuda.h"
#include "splat/cuda.h"
#include "splat/project/cuda.h"

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

void Free() {
  for (void* data : allocations) Check(cudaFree(data), "cudaFree");
  allocations.clear();
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

// Random bits.
template <class T>
void Scramble(T* data, int64_t n) {
  std::vector<uint32_t> bits(n * sizeof(T) / 4);
  for (uint32_t& b : bits) b = static_cast<uint32_t>(generator());
  Check(cudaMemcpy(data, bits.data(), n * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
}

template <class T, class TF>
void Exercise(MetricKind metric, int64_t Q, int64_t P, int64_t F, int64_t K, bool shared, int64_t B = 3) {
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
  // In every way: all pairs compared, by the filter and without, and through an index, with guesses and without.
  const int64_t clouds = shared ? 1 : B;
  const int64_t of_index = P * kIndexBytesOfPoint + kExtentsBytes,
                of_filter = P * kFilterBytesOfPoint + kFilterBytesOfCloud;
  const int64_t bytes =
      std::max({clouds * of_index + kSortBytes, clouds * of_filter, B * Q * kSearchBytesOfQuery + kSortBytes});
  void* const memory = Allocate<uint8_t>(bytes);
  Check(LaunchSearch(search, metric, memory, bytes, nullptr), "search");
  Check(LaunchExhaustiveSearch(search, metric, nullptr), "exhaustive search");
  const IndexShape shape = ShapeOfIndex(P);
  const int64_t rows = aniso ? kLeafRows<MetricKind::kAnisotropic> : kLeafRows<MetricKind::kIsotropic>;
  BuildIndex<T> build = {{1, {clouds}}, P, search.p, search.sigma, search.R, search.lengths};
  build.leaves = Allocate<T>(clouds * shape.leaves * rows * kLeafSize);
  build.order = Allocate<int32_t>(clouds * shape.leaves * kLeafSize);
  build.nodes = Allocate<T>(clouds * shape.groups * kNodeRows * kFanOut);
  Check(LaunchBuildIndex(build, metric, memory, bytes, nullptr), "index");
  search.index.leaves = {build.leaves, {shared ? 0 : shape.leaves * rows * kLeafSize}};
  search.index.order = {build.order, {shared ? 0 : shape.leaves * kLeafSize}};
  search.index.nodes = {build.nodes, {shared ? 0 : shape.groups * kNodeRows * kFanOut}};
  Check(LaunchSearch(search, metric, memory, bytes, nullptr), "search through an index");
  search.W = K;
  search.warm = {Allocate<int32_t>(B * Q * K), {Q * K}};
  Check(cudaMemcpy(const_cast<int32_t*>(search.warm.data), search.idxs, B * Q * K * sizeof(int32_t),
                   cudaMemcpyDeviceToDevice),
        "cudaMemcpy");
  Check(LaunchSearch(search, metric, memory, bytes, nullptr), "search with guesses");
  // Whatever an index holds: what is found is of no interest, but memcheck sees where it was looked for.
  int32_t* const found = search.idxs;
  search.idxs = Allocate<int32_t>(B * Q * K);
  Scramble(build.leaves, clouds * shape.leaves * rows * kLeafSize);
  Scramble(build.order, clouds * shape.leaves * kLeafSize);
  Scramble(build.nodes, clouds * shape.groups * kNodeRows * kFanOut);
  Check(LaunchSearch(search, metric, memory, bytes, nullptr), "search through garbage");
  search.idxs = found;

  // Scratch is as large as ops/knn/aggregate.py makes it.
  const int64_t sets = shared ? 1 : B, pairs = B / sets * Q * K;
  const int64_t sort_bytes = P <= kMaxCounted ? 4 * sets * ((pairs + kCountedTile - 1) / kCountedTile + 1) * (P + 1)
                                              : kInvertBytesOfPair * sets * pairs + kSortBytes;
  Invert invert = {batch, kept, P, pairs, Q * K, search.idxs};
  invert.order = Allocate<int32_t>(sets * pairs);
  invert.offsets = Allocate<int32_t>(sets * (P + 1));
  Check(LaunchInvert(invert, Allocate<uint8_t>(sort_bytes), sort_bytes, nullptr), "invert");

  Aggregate<T, TF> all = {batch, Q, P, F, K, kStored<TF>, search.q, search.p, Random<TF>(B, P * F, shared)};
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
  all.v_ct_f = Random<TF>(B, Q * F, shared);
  all.v_ct_w = Random<T>(B, Q * K, true);
  all.v_ct_d = Random<T>(B, Q * K, false);
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
  all.factors = Allocate<MovingFactors<T>>(B * Q * K);
  all.pieces = Allocate<T>(sets * ((pairs + kPiecePairs - 1) / kPiecePairs) * 2 * (F + kPieceTerms));
  for (auto role : {AggregateRole::kValue, AggregateRole::kJvp, AggregateRole::kVjp, AggregateRole::kVjpVjp,
                    AggregateRole::kVjpJvp}) {
    Check(LaunchAggregate(Retyped<AnyHalf<TF>>(all), metric, role, nullptr), "aggregate");
    Check(cudaDeviceSynchronize(), "synchronize");
  }
  Free();
}

// Rays of N samples each, and the same arrays as R ragged rays with samples outside all of them at either end.
template <class T>
void ExerciseDistortion(int64_t N, int64_t R, bool shared) {
  const int64_t B = 3;
  Distortion<T> all = {};
  all.batch = {1, {B}};
  all.N = N;
  all.R = 1;
  all.w = Random<T>(B, N, false);
  all.m = Random<T>(B, N, shared);
  all.shared_interval = shared;
  all.interval = Random<T>(B, shared ? 1 : N, shared);

  std::vector<int32_t> ids(N);
  for (int64_t i = 0; i < N; ++i) ids[i] = static_cast<int32_t>(i * (R + 2) / N - 1);
  RayOffsets offsets = {all.batch, N, R, {Allocate(N, ids), {0}}, Allocate<int32_t>(B * (R + 1))};
  Check(LaunchRayOffsets(offsets, nullptr), "ray offsets");

  for (bool flat : {false, true}) {
    Distortion<T> args = all;
    if (flat) {
      args.R = R;
      args.offsets = {offsets.offsets, {R + 1}};
    }
    args.ct = Random<T>(B, args.R, false);
    for (bool tangents : {false, true}) {
      if (tangents) {
        args.v_w = Random<T>(B, N, false);
        args.v_m = Random<T>(B, N, shared);
        args.v_interval = Random<T>(B, shared ? 1 : N, shared);
        args.v_ct = Random<T>(B, args.R, shared);
      }
      Distortion<T> value = args, of_w = args, of_all = args;
      value.loss = Allocate<T>(B * args.R);
      of_w.w_bar = Allocate<T>(B * N);
      of_all.w_bar = Allocate<T>(B * N);
      of_all.m_bar = Allocate<T>(B * N);
      of_all.interval_bar = Allocate<T>(shared ? B * args.R : B * N);
      if (tangents) of_all.loss = value.loss;
      of_w.right_sums = of_all.right_sums = Allocate<T>(B * WholeTiles(args) * kRightSums);
      for (const Distortion<T>& role : {value, of_w, of_all}) {
        Check(LaunchDistortion(role, nullptr), "distortion");
        Check(cudaDeviceSynchronize(), "synchronize");
      }
    }
  }
  Free();
}

// Of a table, features or cotangents: T, or what `stored` says in its place.
template <class T>
Operand<const T> RandomStored(Stored stored, int64_t batch, int64_t n, bool shared) {
  if (stored == Stored::whole) return Random<T>(batch, n, shared);
  const Operand<const Half> halves = Random<Half>(batch, n, shared);
  return {reinterpret_cast<const T*>(halves.data), {halves.stride[0]}};
}

template <class T>
void ExerciseHashGrid(int dim, int features, Interpolation interpolation, Stored stored, int64_t N, bool shared) {
  constexpr int64_t B = 2;
  HashGrid<T, T> grid = {};
  grid.batch = {1, {B}};
  grid.table_batch = {1, {shared ? 1 : B}};
  grid.N = N, grid.dim = dim, grid.levels = 5, grid.features = features, grid.interpolation = interpolation;
  grid.stored = stored;
  for (int l = 0; l < grid.levels; ++l) {
    Level& level = grid.level[l];
    level.scale = 3.0f * static_cast<float>(l + 1);
    level.first = grid.rows;
    level.rows = l < 2 ? 24 : 64;  // the first are no power of two, and numbers go beyond
    level.hashed = l >= 2;
    for (int d = 0, stride = 1; d < dim; ++d, stride *= 3 * l + 4) level.stride[d] = static_cast<uint32_t>(stride);
    grid.rows += level.rows;
    grid.most_scale = level.scale;
  }
  const int64_t table = int64_t{grid.rows} * features, outputs = int64_t{grid.levels} * features;
  const int64_t bytes = (shared ? 1 : B) * (2 * sizeof(T) * table + grid.levels * kUnitBytes);
  grid.x.value = Random<T>(B, N * dim, false);
  grid.table.value = RandomStored<T>(stored, B, table, shared);
  grid.weights = Random<T>(B, grid.levels, shared);
  grid.ct.value = RandomStored<T>(stored, B, N * outputs, false);
  for (bool tangents : {false, true}) {
    if (tangents) {
      grid.x.tangent = Random<T>(B, N * dim, shared);
      grid.table.tangent = RandomStored<T>(stored, B, table, shared);
      grid.ct.tangent = RandomStored<T>(stored, B, N * outputs, false);
    }
    const int64_t width = stored == Stored::whole ? sizeof(T) : 2;
    grid.y = reinterpret_cast<T*>(Allocate<char>(B * N * outputs * width));
    grid.x_bar = Allocate<T>(B * N * dim);
    grid.table_bar = reinterpret_cast<T*>(Allocate<char>((shared ? 1 : B) * table * width));
    T* parts = Allocate<T>(KNN_ISA::CeilDiv(grid.levels, KNN_ISA::LevelsOfThread(features)) * B * N * dim);
    Check(LaunchHashGrid(grid, parts, Allocate<char>(bytes), bytes, nullptr), "hash grid");
    Check(cudaDeviceSynchronize(), "synchronize");
  }
  Free();
}

void ExerciseMlp(const std::vector<int>& widths, ActivationKind kind, ProductPrecision precision, Stored stored,
                 int64_t N, bool shared) {
  const int64_t B = 3, width = stored == Stored::whole ? sizeof(float) : 2;
  const std::vector<int64_t> sizes(widths.begin(), widths.end());
  const int layers = static_cast<int>(widths.size()) - 1;
  if (!MlpCudaServes(sizes.data(), layers, width)) return;
  Mlp<float, float> mlp = {};
  mlp.batch = {1, {B}};
  mlp.sum_batch = {1, {shared ? 1 : B}};
  mlp.N = N, mlp.parts = 2, mlp.layers = layers;
  mlp.activation = {kind, 2}, mlp.output_activation = {ActivationKind::sigmoid, 0};
  mlp.precision = precision, mlp.stored = stored;
  std::copy(widths.begin(), widths.end(), mlp.width);
  mlp.part_width[0] = widths[0] / 3, mlp.part_width[1] = widths[0] - widths[0] / 3;
  const auto result = [&](int64_t n) { return reinterpret_cast<float*>(Allocate<char>(n * width)); };
  for (bool tangents : {false, true}) {
    const auto input = [&](Input<float>& to, int64_t n, bool of_all) {
      (tangents ? to.tangent : to.value) = RandomStored<float>(stored, B, n, of_all);
    };
    for (int i = 0; i < mlp.parts; ++i) input(mlp.x[i], N * mlp.part_width[i], false);
    for (int l = 0; l < layers; ++l) {
      input(mlp.weight[l], widths[l] * widths[l + 1], shared);
      input(mlp.bias[l], widths[l + 1], shared);
    }
    mlp.y = result(B * N * widths[layers]);
    Check(LaunchMlp(mlp, nullptr, 0, nullptr), "perceptron");
    Mlp<float, float> gradients = mlp;
    input(mlp.ct, N * widths[layers], false);
    gradients.ct = mlp.ct;
    for (int i = 0; i < mlp.parts; ++i) gradients.x_bar[i] = result(B * N * mlp.part_width[i]);
    for (bool sums : {false, true}) {
      const int64_t sets = shared ? 1 : B;
      for (int l = 0; l < layers && sums; ++l) {
        gradients.weight_bar[l] = result(sets * widths[l] * widths[l + 1]);
        gradients.bias_bar[l] = result(sets * widths[l + 1]);
      }
      const int64_t bytes = MlpCudaScratchBytes(sizes.data(), layers, sizeof(float), sums ? sets : 0);
      Check(LaunchMlp(gradients, Allocate<char>(bytes + 1), bytes, nullptr), "gradients of the perceptron");
      Check(cudaDeviceSynchronize(), "synchronize");
    }
  }
  Free();
}

// A list of as many zeros as are wanted, in full batch.
Operand<int32_t> Numbers(int64_t batch, int64_t n) {
  return {Allocate<int32_t>(batch * n, std::vector<int32_t>(batch * n)), {n}};
}

// capacity: of the lists; where they are too short, gradients are sums of whole numbers.
template <class T>
void ExerciseSplat(int width, int height, int64_t P, int C, int64_t capacity, bool shared) {
  constexpr int64_t B = 2;
  const int64_t tiles = KNN_ISA::TileCount({width, height}), pixels = int64_t{width} * height;
  const auto of_x = [&](bool same) {
    std::vector<Operand<const T>> x;
    for (int64_t n : {2 * P, 3 * P, P, P * C, int64_t{C}}) x.push_back(Random<T>(B, n, same));
    return x;
  };
  auto x = of_x(shared);
  {  // over the whole image, and positive definite
    std::vector<T> means(B * P * 2), conics(B * P * 3);
    for (T& m : means) m = static_cast<T>(generator() % (width + height));
    for (size_t i = 0; i < conics.size(); ++i) conics[i] = i % 3 == 1 ? T(0.01) : T(0.02) + T(generator() % 9);
    x[0] = {Allocate(B * P * 2, means), {P * 2}}, x[1] = {Allocate(B * P * 3, conics), {P * 3}};
  }
  const Operand<const float> depths = Random<float>(B, P, shared);
  Tiles<T> list = {{1, {B}}, P, capacity, {width, height}, x[0], x[1], x[2], depths, {}, {}};
  list.lists = {Numbers(B, P), Numbers(B, P + 1), Numbers(B, capacity), Numbers(B, capacity), Numbers(B, tiles)};
  const int64_t list_bytes = std::max(P, capacity) * kTilesBytesOfItem + kSortBytes;
  Check(LaunchTiles(list, Allocate<char>(list_bytes), list_bytes, nullptr), "tiles");

  Splat<T> splat = {};
  splat.batch = {1, {B}};
  splat.P = P, splat.capacity = capacity, splat.channel_count = C, splat.screen = {width, height};
  Input<T>* inputs[] = {&splat.means, &splat.conics, &splat.opacities, &splat.channels, &splat.background};
  for (int i = 0; i < 5; ++i) inputs[i]->value = x[i];
  const auto constant = [](const Operand<int32_t>& o) { return Operand<const int32_t>{o.data, {o.stride[0]}}; };
  splat.lists = {constant(list.lists.order), constant(list.lists.offsets), constant(list.lists.owners),
                 constant(list.lists.slots), constant(list.lists.ends)};
  splat.image_ct.value = Random<T>(B, pixels * C, shared);
  splat.alpha_ct.value = Random<T>(B, pixels, shared);
  for (bool dual : {false, true}) {
    splat.dual = dual;
    if (dual) {
      const auto v = of_x(shared);
      for (int i = 0; i < 5; ++i) inputs[i]->tangent = v[i];
      splat.image_ct.tangent = Random<T>(B, pixels * C, shared);
    }
    const int64_t planes = dual ? 2 : 1;
    splat.image = Allocate<T>(B * pixels * C);
    splat.alpha = Allocate<T>(B * pixels);
    splat.through_out = Allocate<T>(B * planes * pixels);
    splat.last_out = Allocate<int32_t>(B * pixels);
    Check(LaunchSplatForward(splat, nullptr), "splat");
    splat.through = {splat.through_out, {planes * pixels}};
    splat.last = {splat.last_out, {pixels}};
    splat.means_bar = Allocate<T>(B * P * 2);
    splat.conics_bar = Allocate<T>(B * P * 3);
    splat.opacities_bar = Allocate<T>(B * P);
    splat.channels_bar = Allocate<T>(B * P * C);
    splat.background_bar = Allocate<T>(B * C);
    const int64_t item = sizeof(T), rows = std::max(capacity * item, P * (8 + item));
    const int64_t bytes = ((dual ? 12 : 6) + C) * rows + 256 + tiles * C * item;
    Check(LaunchSplatBackward(splat, Allocate<char>(bytes), bytes, nullptr), "gradients of splat");
    Check(cudaDeviceSynchronize(), "synchronize");
  }
  Free();
}

// Harmonics of a degree, of which an array has some more; without, degree is −1.
template <class T>
void ExerciseProjection(int64_t P, int degree, bool matrices, bool shared) {
  constexpr int64_t B = 2;
  Projection<T> p = {};
  p.batch = {1, {B}}, p.kept = {1, {shared ? 1 : B}};
  p.P = P, p.degree = degree, p.M = degree < 0 ? 1 : (degree + 1) * (degree + 1) + degree % 2;
  p.antialiased = matrices, p.screen = {50, 37};
  p.near = T(0.01), p.far = T(1e6), p.eps2d = T(0.3);
  p.usable = {Allocate<int32_t>(1, {1}), {0}};
  const int64_t channels = p.channel_count(), camera_size = p.camera_size();
  struct Member {
    Input<T>* input;
    T** result;
    int64_t size;
  };
  std::vector<Member> x = {{&p.means, &p.means_bar, 3 * P}, {&p.opacities, &p.opacities_bar, P}};
  if (matrices) {
    x.push_back({&p.covariances, &p.covariances_bar, 9 * P});
  } else {
    x.push_back({&p.quats, &p.quats_bar, 4 * P});
    x.push_back({&p.scales, &p.scales_bar, 3 * P});
    x.push_back({&p.offset, &p.offset_bar, 2 * P});
  }
  if (p.has_colors()) x.push_back({&p.colors, &p.colors_bar, 3 * P * p.M});
  for (const Member& m : x) m.input->value = Random<T>(B, m.size, shared);
  p.camera.value = Random<T>(B, camera_size, false);
  const std::vector<Member> y = {{&p.means2d_ct, &p.means2d, 2 * P},
                                 {&p.conics_ct, &p.conics, 3 * P},
                                 {&p.opacities_ct, &p.opacities_out, P},
                                 {&p.channels_ct, &p.channels, channels * P}};
  const auto want_y = [&](bool want) {
    for (const Member& m : y) *m.result = want ? Allocate<T>(B * m.size) : nullptr;
  };
  want_y(true);
  p.depths = Allocate<float>(B * P);
  p.radii = Allocate<int32_t>(B * P);
  p.reach = Allocate<int32_t>(B * P * 4);
  Check(LaunchProjection(p, nullptr), "projection");
  p.depths = nullptr, p.radii = p.reach = nullptr;

  p.means2d_ct.value = Random<T>(B, 2 * P, shared);
  p.conics_ct.value = Random<T>(B, 3 * P, shared);
  p.channels_ct.value = Random<T>(B, channels * P, shared);
  p.camera_bar = Allocate<T>(B * camera_size);
  p.camera_parts = Allocate<T>(B * camera_size * WarpsOf(P));
  for (bool dual : {false, true}) {  // with tangents, those of y besides
    p.dual = dual;
    want_y(dual);
    if (dual) p.opacities_ct.tangent = Random<T>(B, P, shared);
    for (const Member& m : x) {
      if (dual) m.input->tangent = Random<T>(B, m.size, shared);
      *m.result = Allocate<T>((shared ? 1 : B) * m.size);
    }
    Check(LaunchProjection(p, nullptr), "gradients of projection");
    Check(cudaDeviceSynchronize(), "synchronize");
  }
  for (const Member& m : x) *m.result = nullptr;
  p.camera_bar = nullptr;
  Check(LaunchProjection(p, nullptr), "tangents of projection");
  Check(cudaDeviceSynchronize(), "synchronize");
  Free();
}

}  // namespace

int main() {
  for (MetricKind metric : {MetricKind::kAnisotropic, MetricKind::kIsotropic}) {
    for (bool shared : {false, true}) {
      Exercise<float, float>(metric, 70, 300, 64, 16, shared);
      Exercise<float, float>(metric, 300, 20, 7, 20, shared);   // long lists, fewer than K points
      Exercise<float, float>(metric, 2100, 8, 4, 8, shared);    // so long that blocks share them
      Exercise<float, float>(metric, 40, 9000, 12, 5, shared);  // a radix sort groups pairs
      Exercise<float, BFloat16>(metric, 9, 130, 33, 100, shared);
      Exercise<float, Half>(metric, 9, 600, 64, 256, shared);
      Exercise<float, float>(metric, 30, 300, 8, 50, shared);
      Exercise<float, float>(metric, 100, 5000, 8, 40, shared);
      Exercise<float, float>(metric, 3, 40, 4, 5, shared, 1025);  // more clouds than a sort key has bits for at first
      Exercise<double, double>(metric, 33, 257, 65, 40, shared);
      Exercise<double, double>(metric, 70, 300, 64, 8, shared);
      Exercise<double, double>(metric, 9, 300, 12, 100, shared);
      Exercise<double, double>(metric, 9, 600, 4, 256, shared);
    }
  }
  for (bool shared : {false, true}) {
    for (int64_t N : {1, 37, 128, 513, 1400}) {
      ExerciseDistortion<float>(N, 7, shared);
      ExerciseDistortion<double>(N, N / 3, shared);  // sometimes no rays
    }
    ExerciseDistortion<float>(50000, 9000, shared);  // so many that warps have several
  }
  for (Interpolation interpolation : {Interpolation::nearest, Interpolation::linear, Interpolation::smoothstep}) {
    for (int dim : {2, 3, 4}) {
      ExerciseHashGrid<float>(dim, 2, interpolation, Stored::whole, 300, dim == 3);
      ExerciseHashGrid<double>(dim, 1, interpolation, Stored::whole, 33, dim == 2);
      ExerciseHashGrid<float>(dim, 4, interpolation, Stored::half, 70, dim == 4);
    }
  }
  for (ActivationKind kind : {ActivationKind::relu, ActivationKind::softplus, ActivationKind::gelu_exact}) {
    const bool shared = kind != ActivationKind::softplus;
    for (const std::vector<int>& widths :
         {std::vector<int>{17, 33, 5}, {6, 4}, {32, 64, 64, 64, 1}, {8, 64, 64, 64, 64, 64, 40}}) {
      for (ProductPrecision precision : {ProductPrecision::fast, ProductPrecision::highest}) {
        ExerciseMlp(widths, kind, precision, Stored::whole, 77, shared);
      }
      ExerciseMlp(widths, kind, ProductPrecision::fast, Stored::half, 300, shared);
      ExerciseMlp(widths, kind, ProductPrecision::fast, Stored::bfloat16, 1, shared);
    }
  }
  for (bool shared : {false, true}) {
    for (int64_t capacity : {1, 20000}) {
      ExerciseSplat<float>(50, 37, 300, 4, capacity, shared);
      ExerciseSplat<float>(33, 16, 70, 35, capacity, shared);
      ExerciseSplat<double>(20, 40, 70, 3, capacity, shared);
      ExerciseSplat<double>(1, 1, 5, 18, capacity, shared);
    }
    for (int degree : {-1, 0, 1, 2, 3}) {
      ExerciseProjection<float>(150, degree, degree == 2, shared);
      ExerciseProjection<double>(70, degree, degree == 3, shared);
    }
  }
  std::puts("all kernels ran");
  return 0;
}
