// Builds the index of index.h on CPUs.
//
// The curve is a k-d tree's: a range of leaves is split in two, points on one side of a plane first, until it is one
// leaf. Leaves so come out full, boxes do not overlap, and outliers or clusters do no harm, as they do to curves
// through a grid. Splits fall on whole groups where they can, so that a group's box is tight as well.
//
// Phase 1 gathers what decides the order. Phases 2 to 5 make the first splits, each range on a thread of its own, phase
// 6 the rest, and writes leaves and their nodes. Phase 7 writes the nodes above.

#include "knn/index/cpu.h"

#include <algorithm>
#include <limits>

#include "common/simd.h"
#include "knn/index/bounds.h"

namespace knn::KNN_ISA {
namespace {

template <class T, template <class> class Metric>
struct Builder {
  static constexpr bool kAnisotropic = Metric<T>::kKind == MetricKind::kAnisotropic;
  static constexpr int64_t kRows = kLeafRows<Metric<T>::kKind>;
  static constexpr T kInf = std::numeric_limits<T>::infinity();

  struct Item {
    T at[3];
    float size;   // the exponent of the metric's trace, or one of those below
    int32_t idx;  // −1 for a point left out
  };
  // One bound for metrics of very different sizes would be loose for most. Ranges where they differ by more than a
  // factor 2^kSizes are split by size, which also puts last what has no bound, and what is left out.
  static constexpr float kSizes = 6, kUnbounded = 1e10f, kLeftOut = 2e10f;

  // Leaves [begin, end).
  struct Range {
    int64_t begin, end;
  };
  static constexpr int kSplits = 4;  // how often a phase of its own splits all ranges there are

  // Memory of one cloud.
  struct Cloud {
    Range* ranges;  // [2 << kSplits]: range i is split into ranges 2i and 2i + 1; the first is 1
    Item* items;    // [leaves, kLeafSize]
    IndexShape shape;
    T* leaves;
    int32_t* order;
    T* nodes;

    Cloud(const BuildIndex<T>& x, void* scratch, int64_t cloud) : shape(ShapeOfIndex(x.P)) {
      char* memory = static_cast<char*>(scratch) + cloud * Bytes(x);
      ranges = reinterpret_cast<Range*>(memory);
      items = reinterpret_cast<Item*>(memory + RangeBytes());
      leaves = x.leaves + cloud * shape.leaves * kRows * kLeafSize;
      order = x.order + cloud * shape.leaves * kLeafSize;
      nodes = x.nodes + cloud * shape.groups * kNodeRows * kFanOut;
    }
    static int64_t RangeBytes() { return (2 << kSplits) * sizeof(Range); }
    static int64_t Bytes(const BuildIndex<T>& x) {
      return RangeBytes() + CeilDiv(ShapeOfIndex(x.P).leaves * kLeafSize * sizeof(Item), 64) * 64;
    }
    T* Row(int64_t group, int row) const { return nodes + (group * kNodeRows + row) * kFanOut; }
  };

  static int64_t ScratchBytes(const BuildIndex<T>& x) { return Count(x.batch) * Cloud::Bytes(x); }

  // Phase 1.

  static constexpr int64_t kItemsPerTask = 4096;
  static int64_t TasksOfCloud(const BuildIndex<T>& x) { return std::max<int64_t>(CeilDiv(x.P, kItemsPerTask), 1); }
  static int64_t GatherTasks(const BuildIndex<T>& x) { return Count(x.batch) * TasksOfCloud(x); }

  static bool Finite(const T* a, int n) {
    T zero = 0;
    for (int i = 0; i < n; ++i) zero += a[i] * 0;
    return zero == 0;
  }

  // What decides a point's place. The position of a point without a bound does not matter.
  static Item ItemOf(const T* p, const T* sigma, const T* R, int64_t i) {
    p += 3 * i;
    Item item = {{0, 0, 0}, kLeftOut, -1};
    bool finite = Finite(p, 3), negative = false;
    double trace = 1;
    if constexpr (kAnisotropic) {
      sigma += 3 * i;
      R += 9 * i;
      finite = finite && Finite(sigma, 3) && Finite(R, 9);
      negative = sigma[0] < 0 || sigma[1] < 0 || sigma[2] < 0;
      trace = 0;
      for (int j = 0; j < 9; ++j) trace += static_cast<double>(sigma[j / 3]) * R[j] * R[j];
    }
    if (finite || negative) {
      item.idx = static_cast<int32_t>(i);
      item.size = negative ? kUnbounded : static_cast<float>(std::ilogb(trace));
    }
    if (finite) std::copy(p, p + 3, item.at);
    return item;
  }

  static void Gather(const BuildIndex<T>& x, void* scratch, int64_t task) {
    const int64_t tasks = TasksOfCloud(x), b = task / tasks;
    const Cloud cloud(x, scratch, b);
    if (task % tasks == 0) cloud.ranges[1] = {0, cloud.shape.leaves};
    const T* p = At(x.p, x.batch, b);
    const T* sigma = kAnisotropic ? At(x.sigma, x.batch, b) : nullptr;
    const T* R = kAnisotropic ? At(x.R, x.batch, b) : nullptr;
    const int64_t length = LengthOf(x.lengths, x.batch, b, x.P);
    const int64_t begin = task % tasks * kItemsPerTask;
    const int64_t end = std::min(begin + kItemsPerTask, cloud.shape.leaves * kLeafSize);
    for (int64_t i = begin; i < end; ++i) {
      cloud.items[i] = i < length ? ItemOf(p, sigma, R, i) : Item{{0, 0, 0}, kLeftOut, -1};
    }
  }

  // Phases 2 to 5.

  // Splits a range of at least two leaves.
  static int64_t Split(const Cloud& cloud, Range range) {
    Item* const begin = cloud.items + range.begin * kLeafSize;
    Item* const end = cloud.items + range.end * kLeafSize;
    T low[3], high[3];
    std::fill(low, low + 3, kInf);
    std::fill(high, high + 3, -kInf);
    float least = begin->size, most = begin->size;
    for (const Item* item = begin; item < end; ++item) {
      for (int a = 0; a < 3; ++a) {
        low[a] = std::min(low[a], item->at[a]);
        high[a] = std::max(high[a], item->at[a]);
      }
      least = std::min(least, item->size);
      most = std::max(most, item->size);
    }
    if (most - least > kSizes) {
      const float limit = least + (most - least) / 2;
      const auto smaller = [limit](const Item& item) { return item.size <= limit; };
      const int64_t leaf = range.begin + std::count_if(begin, end, smaller) / kLeafSize;
      const int64_t at = std::clamp(leaf, range.begin + 1, range.end - 1);
      std::nth_element(begin, cloud.items + at * kLeafSize, end,
                       [](const Item& a, const Item& b) { return a.size < b.size; });
      return at;
    }
    int64_t unit = 1;
    while (unit * kFanOut < range.end - range.begin) unit *= kFanOut;
    int64_t at = (range.begin + range.end + unit) / 2 / unit * unit;  // the multiple nearest to the middle
    if (at <= range.begin) at += unit;
    if (at >= range.end) at -= unit;
    int axis = 0;
    for (int a = 1; a < 3; ++a) {
      if (high[a] - low[a] > high[axis] - low[axis]) axis = a;
    }
    std::nth_element(begin, cloud.items + at * kLeafSize, end,
                     [axis](const Item& a, const Item& b) { return a.at[axis] < b.at[axis]; });
    return at;
  }

  template <int level>
  static int64_t SplitTasks(const BuildIndex<T>& x) {
    return x.plain ? 0 : Count(x.batch) << level;
  }

  template <int level>
  static void SplitOnce(const BuildIndex<T>& x, void* scratch, int64_t task) {
    const Cloud cloud(x, scratch, task >> level);
    const int64_t i = (1 << level) + (task & ((1 << level) - 1));
    const Range range = cloud.ranges[i];
    const int64_t at = range.end - range.begin < 2 ? range.end : Split(cloud, range);
    cloud.ranges[2 * i] = {range.begin, at};
    cloud.ranges[2 * i + 1] = {at, range.end};
  }

  // Phase 6.

  static int64_t FinishTasks(const BuildIndex<T>& x) { return Count(x.batch) << kSplits; }

  static void Finish(const BuildIndex<T>& x, void* scratch, int64_t task) {
    const int64_t b = task >> kSplits, i = task & ((1 << kSplits) - 1);
    const Cloud cloud(x, scratch, b);
    if (x.plain) {
      const int64_t leaves = cloud.shape.leaves;
      for (int64_t leaf = leaves * i >> kSplits; leaf < leaves * (i + 1) >> kSplits; ++leaf) {
        WriteLeaf(x, b, cloud, leaf);
        Write(cloud, 0, leaf, Bare(-kInf));
      }
    } else {
      Finish(x, b, cloud, cloud.ranges[(1 << kSplits) + i]);
    }
  }

  static void Finish(const BuildIndex<T>& x, int64_t b, const Cloud& cloud, Range range) {
    if (range.end - range.begin > 1) {
      const int64_t at = Split(cloud, range);
      Finish(x, b, cloud, {range.begin, at});
      Finish(x, b, cloud, {at, range.end});
    } else if (range.end > range.begin) {
      WriteLeaf(x, b, cloud, range.begin);
      WriteNode(cloud, range.begin);
    }
  }

  static void WriteLeaf(const BuildIndex<T>& x, int64_t b, const Cloud& cloud, int64_t leaf) {
    const T* p = At(x.p, x.batch, b);
    const T* sigma = kAnisotropic ? At(x.sigma, x.batch, b) : nullptr;
    const T* R = kAnisotropic ? At(x.R, x.batch, b) : nullptr;
    for (int l = 0; l < kLeafSize; ++l) {
      const Item& item = cloud.items[leaf * kLeafSize + l];
      T* row = cloud.leaves + leaf * kRows * kLeafSize + l;
      const auto write = [&row, exists = item.idx >= 0](T value, T missing) {
        *row = exists ? value : missing;
        row += kLeafSize;
      };
      const int64_t i = std::max(item.idx, 0);
      for (int c = 0; c < 3; ++c) write(p[3 * i + c], kInf);
      for (int c = 0; c < 3 && kAnisotropic; ++c) write(sigma[3 * i + c], 0);
      for (int c = 0; c < 9 && kAnisotropic; ++c) write(R[9 * i + c], 0);
      cloud.order[leaf * kLeafSize + l] = item.idx;
    }
  }

  using D = Vec<double>;

  static void WriteNode(const Cloud& cloud, int64_t leaf) {
    const T* points = cloud.leaves + leaf * kRows * kLeafSize;
    const Item* items = cloud.items + leaf * kLeafSize;
    double squared[4][kLeafSize];
    if constexpr (kAnisotropic) {
      for (int l = 0; l < kLeafSize; l += D::kLanes) {
        const auto load = [at = points + l](int row) {
          double wide[D::kLanes];
          for (int i = 0; i < D::kLanes; ++i) wide[i] = at[row * kLeafSize + i];
          return D::Load(wide);
        };
        const D sigma[3] = {load(3), load(4), load(5)};
        const D R[9] = {load(6), load(7), load(8), load(9), load(10), load(11), load(12), load(13), load(14)};
        const Factors<D> factors = SquaredFactors<T>(sigma, R);
        factors.lambda.Store(squared[0] + l);
        for (int a = 0; a < 3; ++a) factors.axis[a].Store(squared[1 + a] + l);
      }
    } else {  // dist = |d|²
      std::fill(squared[0], squared[0] + kLeafSize, 1);
      std::fill(squared[1], squared[4], 0);
    }
    Node node = Bare(kInf);
    double least[4] = {kInf, kInf, kInf, kInf};
    for (int l = 0; l < kLeafSize; ++l) {
      if (items[l].idx < 0) continue;
      for (int a = 0; a < 3; ++a) {
        node.row[kLow + a] = std::min(node.row[kLow + a], items[l].at[a]);
        node.row[kHigh + a] = std::max(node.row[kHigh + a], items[l].at[a]);
      }
      node.row[kBase] = std::min(node.row[kBase], items[l].size < kUnbounded ? 0 : -kInf);
      for (int i = 0; i < 4; ++i)
        least[i] = squared[i][l] < least[i] ? squared[i][l] : squared[i][l] >= least[i] ? least[i] : 0;
    }
    for (int i = 0; i < 4; ++i) node.row[kLambda + i] = RoundDown<T>(std::sqrt(least[i]));
    Write(cloud, 0, leaf, node);
  }

  struct Node {
    T row[kNodeRows];
  };
  // A node that nothing has been added to yet.
  static constexpr Node Bare(T base) { return {{kInf, kInf, kInf, -kInf, -kInf, -kInf, base, kInf, kInf, kInf, kInf}}; }

  // The box of a node without points, or without a bound, is a point: so its bound is its base, whatever the query.
  static void Write(const Cloud& cloud, int level, int64_t i, const Node& node) {
    const bool bounds = node.row[kBase] == 0;
    for (int row = 0; row < kNodeRows; ++row) {
      cloud.Row(cloud.shape.first_group[level] + i / kFanOut, row)[i % kFanOut] =
          bounds || row == kBase ? node.row[row] : 0;
    }
  }

  // Phase 7.

  static void WriteUpper(const BuildIndex<T>& x, void* scratch, int64_t task) {
    const Cloud cloud(x, scratch, task);
    const IndexShape& shape = cloud.shape;
    for (int level = 0; level < shape.levels; ++level) {
      const int64_t groups = shape.first_group[level + 1] - shape.first_group[level];
      for (int64_t i = shape.nodes[level]; i < groups * kFanOut; ++i) Write(cloud, level, i, Bare(kInf));
      for (int64_t group = 0; group < groups && level + 1 < shape.levels; ++group) {
        Node node = Bare(kInf);
        const auto at = [&](int row) { return cloud.Row(shape.first_group[level] + group, row); };
        for (int l = 0; l < kFanOut; ++l) {
          if (at(kBase)[l] == kInf) continue;
          for (int row = 0; row < kNodeRows; ++row) {
            const bool is_high = row >= kHigh && row < kHigh + 3;
            node.row[row] = is_high ? std::max(node.row[row], at(row)[l]) : std::min(node.row[row], at(row)[l]);
          }
        }
        Write(cloud, level + 1, group, node);
      }
    }
  }

  static int64_t Clouds(const BuildIndex<T>& x) { return Count(x.batch); }

  static constexpr CpuKernel<BuildIndex<T>> kKernel = {&ScratchBytes,
                                                       {{&GatherTasks, &Gather},
                                                        {&SplitTasks<0>, &SplitOnce<0>},
                                                        {&SplitTasks<1>, &SplitOnce<1>},
                                                        {&SplitTasks<2>, &SplitOnce<2>},
                                                        {&SplitTasks<3>, &SplitOnce<3>},
                                                        {&FinishTasks, &Finish},
                                                        {&Clouds, &WriteUpper}}};
};

}  // namespace

template <class T>
CpuKernel<BuildIndex<T>> BuildIndexKernel(MetricKind metric) {
  return metric == MetricKind::kAnisotropic ? Builder<T, Anisotropic>::kKernel : Builder<T, Isotropic>::kKernel;
}

template CpuKernel<BuildIndex<float>> BuildIndexKernel<float>(MetricKind metric);
template CpuKernel<BuildIndex<double>> BuildIndexKernel<double>(MetricKind metric);

}  // namespace knn::KNN_ISA
