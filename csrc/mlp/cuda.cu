// The multilayer perceptron on CUDA.
//
// A warp takes sixteen rows through all layers and back. What a layer returns stays in registers: of a product's sums a
// lane holds just the entries of which it needs to have factors in the next product, if what is summed over is dealt
// out to steps of the instruction in pairs of neighbours. With tangents, eight rows and their eight tangents are a
// warp's sixteen: matrices act on both alike, and a lane that has a value has its tangent too.
//
// Weights of all layers lie in shared memory, for all warps of a block. For gradients, shared memory also has a place
// for each layer's rows. The way forward leaves p there; the way back takes p from it, leaves h in its stead, and, once
// the sums β hᵀ over rows that need h are done, β. These sums alone are a matter of all rows of a block, so that its
// warps wait for each other. They are added up over all tiles of a block; a second kernel adds those of the blocks in
// their order.
//
// Products are of matrix units (mma.sync): TF32, of floats and of what has 16 bits, whose numbers all are TF32's too.
// Float proper is three products of TF32, of the leading bits of both factors and of those bits of one with the rest of
// the other.

#include <algorithm>
#include <type_traits>

#include "common/cuda.cuh"
#include "mlp/cuda.h"
#include "mlp/formulas.h"

// Before sm_80 there is no TF32: nothing is compiled for these but empty kernels, and functions that none calls.
#pragma nv_diag_suppress 177

namespace knn::KNN_ISA {
namespace {

// A warp's rows; the columns of a block; the most blocks that a layer has.
constexpr int kRows = 16, kBlock = 8, kBlocks = kMlpCudaMaxWidth / kBlock;

__host__ __device__ __forceinline__ int BlocksOf(int width) { return (width + kBlock - 1) / kBlock; }
__device__ __forceinline__ int Lane() { return threadIdx.x & (kWarp - 1); }

// ---- Arithmetic of activations: float by instructions that are as exact as float needs, without the code for
// subnormal numbers. Those that go with products of few bits are less exact.

template <bool kExact>
struct Quick {
  float x;
  static __device__ __forceinline__ Quick Broadcast(double c) { return {static_cast<float>(c)}; }
  friend __device__ __forceinline__ Quick operator+(Quick a, Quick b) { return {a.x + b.x}; }
  friend __device__ __forceinline__ Quick operator-(Quick a, Quick b) { return {a.x - b.x}; }
  friend __device__ __forceinline__ Quick operator*(Quick a, Quick b) { return {a.x * b.x}; }
  friend __device__ __forceinline__ Quick operator/(Quick a, Quick b) {
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b.x));
    return {a.x * inverse};
  }
  friend __device__ __forceinline__ Quick operator-(Quick a) { return {-a.x}; }
  friend __device__ __forceinline__ Quick Scale(double c, Quick a) { return {static_cast<float>(c) * a.x}; }
  friend __device__ __forceinline__ Quick SelectLess(Quick a, Quick b, Quick less, Quick otherwise) {
    return {a.x < b.x ? less.x : otherwise.x};
  }
  friend __device__ __forceinline__ Quick MinusSize(Quick a) { return {-fabsf(a.x)}; }
  friend __device__ __forceinline__ Quick Positive(Quick a) {
#if __CUDA_ARCH__ >= 800
    float x;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(x) : "f"(a.x));
    return {x};
#else
    return {a.x < 0 ? 0 : a.x};
#endif
  }
  friend __device__ __forceinline__ Quick Exp(Quick a) {
    constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
    const float t = a.x * kLog2e;
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
    // What t was rounded by, unless it is infinite.
    return {kExact && fabsf(t) < 128 ? fmaf(power * kLn2, fmaf(a.x, kLog2e, -t), power) : power};
  }
  friend __device__ __forceinline__ Quick ExpOfNegative(Quick a) { return Exp(a); }
  // For 0 <= a <= 1, as it is used.
  friend __device__ __forceinline__ Quick Log1p(Quick a) {
    const float t = a.x;
    if constexpr (!kExact) {
      float log;
      asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(1 + t));
      return {log * 0.6931471805599453f};
    }
    float p = 0.005253457929939032f;
    p = fmaf(p, t, -0.02958850748836994f);
    p = fmaf(p, t, 0.07836166769266129f);
    p = fmaf(p, t, -0.13674770295619965f);
    p = fmaf(p, t, 0.19111430644989014f);
    p = fmaf(p, t, -0.24844369292259216f);
    p = fmaf(p, t, 0.33319270610809326f);
    p = fmaf(p, t, -0.49999502301216125f);
    p = fmaf(p, t, 1.0f);
    return {p * t};
  }
  friend __device__ __forceinline__ Quick Expm1(Quick a) { return {expm1f(a.x)}; }
  friend __device__ __forceinline__ Quick Erfc(Quick a) { return {erfcf(a.x)}; }
  friend __device__ __forceinline__ Quick Sqrt(Quick a) { return {__fsqrt_rn(a.x)}; }
  friend __device__ __forceinline__ Quick Sin(Quick a) { return {Wave(a.x, 0)}; }
  friend __device__ __forceinline__ Quick Cos(Quick a) { return {Wave(a.x, 0.5f)}; }

  // sin(x + shift·π): less the multiple n·π next to it, by π in three parts.
  static __device__ __forceinline__ float Wave(float x, float shift) {
    const float n = rintf(fmaf(x, 0.31830988618379067f, shift)), of = n - shift;
    float r = fmaf(of, -3.14159274101257324f, x);
    r = fmaf(of, 8.74227765734758577e-08f, r);
    r = fmaf(of, 3.43024902e-15f, r);
    const float s = r * r;
    float p = fmaf(s, -2.3889859e-08f, 2.7525562e-06f);
    p = fmaf(p, s, -1.9840874e-04f);
    p = fmaf(p, s, 8.3333310e-03f);
    p = fmaf(p, s, -1.6666667e-01f);
    const float sine = fmaf(r * s, p, r);
    return static_cast<int>(n) & 1 ? -sine : sine;
  }
};
template <bool kExact>
__device__ __forceinline__ float Raw(Quick<kExact> x) {
  return x.x;
}

// ---- Kinds of arithmetic: factors and sums of products of 16 × 8 and 8 × 8. Lane 4g + t of a warp has rows g and g +
// 8 of A and of sums, and column g of B. What is summed over comes in pairs, of which it has pair t: so A is {row g's
// first, row g + 8's first, row g's second, row g + 8's second}. Of sums it has columns 2t and 2t + 1, row g first.

__device__ __forceinline__ void MultiplyTf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// Adds half of the last bit that TF32 has, on average.
__device__ __forceinline__ float AddHalf(float x) { return fmaf(x, 3.522e-4f, x); }

// With kSplit float, without TF32.
template <bool kSplit>
struct Floats {
  static constexpr bool kExact = kSplit;
  using Activated = Quick<kSplit>;
  template <int n>
  struct Factor {
    uint32_t high[n], low[kSplit ? n : 1];
  };
  using A = Factor<4>;
  using B = Factor<2>;

  // Leading bits are cut off, of A's after half of the last of them, about, has been added: rests of both of one sign,
  // as the numbers, would have products of one sign too, which are left out.
  template <int n>
  static __device__ __forceinline__ Factor<n> Make(const float (&x)[n]) {
    Factor<n> f;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      f.high[i] = __float_as_uint(x[i]);
      if constexpr (kSplit) {
        f.high[i] = __float_as_uint(n == 4 ? AddHalf(x[i]) : x[i]) & 0xffffe000u;
        f.low[i] = __float_as_uint(x[i] - __uint_as_float(f.high[i]));
      }
    }
    return f;
  }
  // Of two steps. Matrix units cut what they add off, where floats are rounded: so they add up little, smallest first.
  static __device__ __forceinline__ void Multiply(float (&sum)[4], const A (&a)[2], const B (&b)[2]) {
    if constexpr (kSplit) {
      float part[4] = {};
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        MultiplyTf32(part, a[k].low, b[k].high);
        MultiplyTf32(part, a[k].high, b[k].low);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) MultiplyTf32(part, a[k].high, b[k].high);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part[i];
    } else {
#pragma unroll
      for (int k = 0; k < 2; ++k) MultiplyTf32(sum, a[k].high, b[k].high);
    }
  }
  // To what products take. They cut off bits: what is added first, on average half of the last bit that they take,
  // makes up for that. It does without the tests that rounding needs to leave NaN and infinity alone.
  template <int n>
  static __device__ __forceinline__ void Round(float (&x)[n]) {
    if constexpr (!kSplit) {
#pragma unroll
      for (float& y : x) y = AddHalf(y);
    }
  }
  // To what arrays hold, which products take too.
  template <int n>
  static __device__ __forceinline__ void Round(float (&x)[n], Stored stored) {
    if (stored == Stored::whole) return Round(x);
#pragma unroll
    for (float& y : x) {
      Float16 narrow;
      Narrow(y, stored, &narrow);
      y = Widen(narrow, stored);
    }
  }
};

__device__ __forceinline__ void LoadPair(const float* from, float (&x)[2]) {
  const float2 pair = *reinterpret_cast<const float2*>(from);
  x[0] = pair.x, x[1] = pair.y;
}
__device__ __forceinline__ void StorePair(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}

// ---- Reading and writing arrays, whose elements may have 16 bits.

__device__ __forceinline__ float LoadFrom(const float* data, int i, Stored stored) {
  if (stored == Stored::whole) return data[i];
  return Widen(Float16{reinterpret_cast<const uint16_t*>(data)[i]}, stored);
}
__device__ __forceinline__ void StoreTo(float x, float* data, int i, Stored stored) {
  if (stored == Stored::whole) {
    data[i] = x;
  } else {
    Narrow(x, stored, reinterpret_cast<Float16*>(data) + i);
  }
}
// data + i, or null. F may be const.
template <class F>
__device__ __forceinline__ F* Advance(F* data, int64_t i, Stored stored) {
  if (data == nullptr) return nullptr;
  if (stored == Stored::whole) return data + i;
  using Bits = std::conditional_t<std::is_const_v<F>, const uint16_t, uint16_t>;
  return reinterpret_cast<F*>(reinterpret_cast<Bits*>(data) + i);
}
__device__ __forceinline__ const float* ArrayAt(const Operand<const float>& operand, const Batch& batch, int64_t b,
                                                Stored stored) {
  if (operand.data == nullptr) return nullptr;
  return Advance(operand.data, At(operand, batch, b) - operand.data, stored);
}

// ---- What a block does.

// Where things lie in shared memory, by bytes, and how work is divided.
struct Plan {
  int warps;
  bool dual;          // with tangents: a warp has eight rows and their tangents
  bool sums_shared;   // sums of gradients are in shared memory, rather than in scratch
  bool weights_vary;  // between batch entries
  int lowest;         // the first layer whose gradients are wanted, of weights or x
  int pieces;         // blocks that share in a sum
  int bytes;
  int place[kMaxLayers + 1];
  int weight[kMaxLayers], weight_tangent[kMaxLayers], bias[kMaxLayers], bias_tangent[kMaxLayers];
  int sums;
  int64_t parameter[kMaxLayers + 1];  // where a layer's begin in the sums, and their count
  int64_t tiles_of_entry, tiles;      // of a piece
  SplitBatch split;
};

// Rows of a place: eight numbers, or as many more as are wanted so that those that a warp reads or writes at a time lie
// in different banks, be they from eight columns of four rows or from four pairs of columns of four rows.
__host__ __device__ __forceinline__ int StrideOf(int width) { return (BlocksOf(width) | 1) * kBlock; }

// In a block of weights, of eight of what a layer returns by eight of what it takes, the rows 4, 5 and 6, 7 trade
// places. So both pairs of neighbours in a row, as the way forward reads them, and in a column, as that back does, lie
// in different banks.
__device__ __forceinline__ int RowInBlock(int o) { return o ^ (o >> 2 & 1); }

template <class P, bool kBackward>
struct Tile {
  using V = typename P::Activated;
  using Rows = float[kBlocks][4];  // of all columns, what a lane holds of a warp's rows

  const Mlp<float, float>& mlp;
  const Plan& plan;
  char* memory;
  float* sums;
  Stored stored;
  int g = Lane() >> 2, t = Lane() & 3, warp = threadIdx.x / kWarp;
  // Of the tile: the batch entry, its first row in it, and how many rows there are.
  int64_t b = 0, first = 0;
  int rows = 0;

  __device__ __forceinline__ float* At(int bytes) const { return reinterpret_cast<float*>(memory + bytes); }
  // A lane's entries of a layer's place.
  __device__ __forceinline__ float* Place(int l) const {
    return At(plan.place[l]) + (warp * kRows + g) * StrideOf(mlp.width[l]) + 2 * t;
  }
  // The tile's row that a lane's row, or that row and its tangent, are.
  __device__ __forceinline__ int RowOf(int half) const {
    return plan.dual ? warp * (kRows / 2) + g : warp * kRows + g + half * (kRows / 2);
  }

  // ---- Weights.

  __device__ __forceinline__ void CopyWeights(int to, const float* from, int out, int in) const {
    const int blocks = BlocksOf(in), padded = blocks * kBlock;
    for (int o = warp; o < BlocksOf(out) * kBlock; o += plan.warps) {
      float* const row = At(to) + (o / kBlock * blocks * kBlock + RowInBlock(o % kBlock)) * kBlock;
      for (int c = Lane(); c < padded; c += kWarp) {
        float x[1] = {o < out && c < in ? LoadFrom(from, o * in + c, stored) : 0.0f};
        P::Round(x);
        row[c / kBlock * (kBlock * kBlock) + c % kBlock] = x[0];
      }
    }
  }
  __device__ __forceinline__ void CopyBias(int to, const float* from, int out) const {
    for (int o = threadIdx.x; o < BlocksOf(out) * kBlock; o += blockDim.x) {
      At(to)[o] = from != nullptr && o < out ? LoadFrom(from, o, stored) : 0.0f;
    }
  }
  __device__ __forceinline__ void LoadLayer(int l) const {
    const int in = mlp.width[l], out = mlp.width[l + 1];
    CopyWeights(plan.weight[l], ArrayAt(mlp.weight[l].value, mlp.batch, b, stored), out, in);
    CopyBias(plan.bias[l], ArrayAt(mlp.bias[l].value, mlp.batch, b, stored), out);
    if (!plan.dual) return;
    CopyBias(plan.bias_tangent[l], ArrayAt(mlp.bias[l].tangent, mlp.batch, b, stored), out);
    const float* moves = ArrayAt(mlp.weight[l].tangent, mlp.batch, b, stored);
    if (moves != nullptr) CopyWeights(plan.weight_tangent[l], moves, out, in);
  }

  // ---- Products.

  // sum += x Wᵀ, or with kBack x W, of `steps` blocks of what is summed over and `blocks` of sums, with kAll of all of
  // these. If `shifted`, rows of tangents take x's rows of values, and those of values nothing.
  template <bool kBack, bool kAll>
  __device__ __forceinline__ void MultiplyBlocks(const float* weight, int some_steps, int some_blocks, bool shifted,
                                                 const Rows& x, Rows& sum) const {
    constexpr int kSize = kBlock * kBlock;
    const int steps = kAll ? kBlocks : some_steps, blocks = kAll ? kBlocks : some_blocks;
    const float* at[kBlocks];
    if constexpr (kBack) {
      at[0] = weight + RowInBlock(2 * t) * kBlock + g;
      at[1] = weight + RowInBlock(2 * t + 1) * kBlock + g;
    } else {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) at[n] = weight + n * steps * kSize + RowInBlock(g) * kBlock + 2 * t;
    }
    const int step_size = kBack ? blocks * kSize : kSize;
#pragma unroll
    for (int k = 0; k < kBlocks; k += 2) {
      if (!kAll && k >= steps) break;
      const bool second = kAll || k + 1 < steps;
      typename P::A a[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float of_step[4] = {x[k + i][0], x[k + i][2], x[k + i][1], x[k + i][3]};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!kAll && shifted) of_step[j] = j % 2 == 0 ? 0.0f : x[k + i][j / 2];
          if (i == 1 && !second) of_step[j] = 0;
        }
        a[i] = P::Make(of_step);
      }
      const int next = second ? step_size : 0;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        if (!kAll && n >= blocks) break;
        typename P::B b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float pair[2];
          if constexpr (kBack) {
            pair[0] = at[0][i * next + n * kSize], pair[1] = at[1][i * next + n * kSize];
          } else {
            LoadPair(at[n] + k * kSize + i * next, pair);
          }
          b[i] = P::Make(pair);
        }
        P::Multiply(sum[n], a, b);
      }
      if constexpr (kBack) at[0] += 2 * step_size, at[1] += 2 * step_size;
    }
  }
  template <bool kBack>
  __device__ __forceinline__ void Multiply(int l, const Rows& x, Rows& sum) const {
    const int in = BlocksOf(mlp.width[l]), out = BlocksOf(mlp.width[l + 1]);
    const int steps = kBack ? out : in, blocks = kBack ? in : out;
    const bool all = steps == kBlocks && blocks == kBlocks;
    if (all) MultiplyBlocks<kBack, true>(At(plan.weight[l]), steps, blocks, false, x, sum);
    const bool moves = mlp.weight[l].tangent.data != nullptr;
#pragma unroll 1
    for (int pass = all ? 1 : 0; pass < (moves ? 2 : 1); ++pass) {
      const int weight = pass == 0 ? plan.weight[l] : plan.weight_tangent[l];
      MultiplyBlocks<kBack, false>(At(weight), steps, blocks, pass == 1, x, sum);
    }
  }

  // Calls run(kind, whether with tangents, n, of[n]) for the blocks n below `blocks`. Activations that are used most
  // have code for each block, if kUnrolled; by that of others blocks move past.
  template <bool kUnrolled, class Run>
  __device__ __forceinline__ void EachBlock(ActivationKind kind, int blocks, Rows& of, Run&& run) const {
    using K = ActivationKind;
    const auto either = [&](auto&& with) { plan.dual ? with(std::true_type()) : with(std::false_type()); };
    if constexpr (kUnrolled) {
      const auto each = [&](auto k) {
        either([&](auto dual) {
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
            if (n >= blocks) break;
            run(k, dual, n, of[n]);
          }
        });
      };
      if (kind == K::softplus) return each(std::integral_constant<K, K::softplus>());
      if (kind == K::relu) return each(std::integral_constant<K, K::relu>());
    }
#pragma unroll 1
    for (int n = 0; n < kBlocks; ++n) {
      float x[4] = {of[0][0], of[0][1], of[0][2], of[0][3]};
      if (n < blocks) {
        WithKind(kind, [&](auto k) { either([&](auto dual) { run(k, dual, n, x); }); });
      }
      if (blocks > 1) {
#pragma unroll
        for (int m = 1; m < kBlocks; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) of[m - 1][i] = of[m][i];
      }
      const int last = blocks > 1 ? kBlocks - 1 : 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (blocks > 1) {
          of[kBlocks - 1][i] = x[i];
        } else {
          of[0][i] = x[i];
        }
      }
      if (last == 0) break;
    }
  }

  static __device__ __forceinline__ Parameter<V> ParameterOfActivation(const Activation& activation) {
    const float c = static_cast<float>(activation.parameter);
    return {V{c}, V{1 / c}};
  }
  // p becomes h.
  template <ActivationKind kind, bool kDual>
  static __device__ __forceinline__ void Activate4(Parameter<V> parameter, float (&p)[4]) {
#pragma unroll
    for (int i = 0; i < (kDual ? 2 : 4); ++i) {
      const Jet<V> jet = Activate<kind>(V{p[i]}, parameter);
      p[i] = Raw(jet.value);
      if (kDual) p[i + 2] *= Raw(jet.slope);
    }
  }
  // p becomes h, and the gradient in h that in p.
  template <ActivationKind kind, bool kDual>
  static __device__ __forceinline__ void Activate4(Parameter<V> parameter, float (&p)[4], float (&a)[4]) {
#pragma unroll
    for (int i = 0; i < (kDual ? 2 : 4); ++i) {
      const Jet<V> jet = Activate<kind>(V{p[i]}, parameter);
      const float slope = Raw(jet.slope);
      if (kDual) {
        a[i + 2] = a[i + 2] * slope + a[i] * (Raw(jet.bend) * p[i + 2]);
        p[i + 2] *= slope;
      }
      p[i] = Raw(jet.value), a[i] *= slope;
    }
  }

  // ---- Arrays.

  // Calls run(n, i, column of the part) for the blocks n of x and the lane's columns i in these that are of a part that
  // begins at column `before` of x; with kPairs for the first of two.
  template <bool kPairs, class Run>
  __device__ __forceinline__ void EachColumn(int before, int width, Run&& run) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      if ((n + 1) * kBlock <= before) continue;
      if (n * kBlock >= before + width) break;
#pragma unroll
      for (int i = 0; i < (kPairs ? 1 : 2); ++i) {
        const int c = n * kBlock + 2 * t + i - before;
        if (c >= 0 && c < width) run(n, i, c);
      }
    }
  }
  // Whether a lane's two columns are of the same part, and two numbers' place in memory is that of a pair.
  __device__ __forceinline__ bool InPairs(int before, int width) const {
    return stored == Stored::whole && ((before | width) & 1) == 0;
  }
  __device__ __forceinline__ void LoadX(Rows& x) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] = 0;
#pragma unroll 1
    for (int part = 0, before = 0; part < mlp.parts; before += mlp.part_width[part++]) {
      const int width = mlp.part_width[part];
      const float* value = ArrayAt(mlp.x[part].value, mlp.batch, b, stored);
      const float* other = plan.dual ? ArrayAt(mlp.x[part].tangent, mlp.batch, b, stored) : value;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* array = half ? other : value;
        if (array == nullptr || RowOf(half) >= rows) continue;
        const float* from = Advance(array, (first + RowOf(half)) * width, stored);
        if (InPairs(before, width)) {
          EachColumn<true>(before, width, [&](int n, int, int c) {
            float two[2];
            LoadPair(from + c, two);
            x[n][2 * half] = two[0], x[n][2 * half + 1] = two[1];
          });
        } else {
          EachColumn<false>(before, width,
                            [&](int n, int i, int c) { x[n][2 * half + i] = LoadFrom(from, c, stored); });
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) P::Round(x[n]);
  }
  __device__ __forceinline__ void StoreXBar(const Rows& x) const {
#pragma unroll 1
    for (int part = 0, before = 0; part < mlp.parts; before += mlp.part_width[part++]) {
      const int width = mlp.part_width[part];
      if (mlp.x_bar[part] == nullptr) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (RowOf(half) >= rows || (plan.dual && half == 0)) continue;
        float* to = Advance(mlp.x_bar[part], (b * mlp.N + first + RowOf(half)) * width, stored);
        if (InPairs(before, width)) {
          EachColumn<true>(before, width,
                           [&](int n, int, int c) { StorePair(to + c, x[n][2 * half], x[n][2 * half + 1]); });
        } else {
          EachColumn<false>(before, width, [&](int n, int i, int c) { StoreTo(x[n][2 * half + i], to, c, stored); });
        }
      }
    }
  }
  __device__ __forceinline__ void StorePlace(int l, const Rows& x) const {
    float* const to = Place(l);
    const int below = kRows / 2 * StrideOf(mlp.width[l]);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      if (n >= BlocksOf(mlp.width[l])) break;
      StorePair(to + n * kBlock, x[n][0], x[n][1]);
      StorePair(to + n * kBlock + below, x[n][2], x[n][3]);
    }
  }

  // ---- The way forward: p of the last layer.
  __device__ __forceinline__ void Forward(Rows& x) const {
    LoadX(x);
#pragma unroll 1
    for (int l = 0; l < mlp.layers; ++l) {
      Rows p;
      const int out = BlocksOf(mlp.width[l + 1]);
      const float *bias = At(plan.bias[l]) + 2 * t, *below = plan.dual ? At(plan.bias_tangent[l]) + 2 * t : bias;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        float two[2][2] = {};
        if (n < out) LoadPair(bias + n * kBlock, two[0]), LoadPair(below + n * kBlock, two[1]);
#pragma unroll
        for (int i = 0; i < 4; ++i) p[n][i] = two[i >> 1][i & 1];
      }
      Multiply<false>(l, x, p);
      if (l + 1 < mlp.layers) {
        if constexpr (kBackward) StorePlace(l + 1, p);
        const Parameter<V> parameter = ParameterOfActivation(mlp.activation);
        EachBlock<true>(mlp.activation.kind, out, p, [&](auto kind, auto dual, int, float (&h)[4]) {
          Activate4<decltype(kind)::value, decltype(dual)::value>(parameter, h);
          P::Round(h, stored);
        });
      }
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] = p[n][i];
    }
  }

  // Writes y; p becomes the gradient in p.
  __device__ __forceinline__ void Finish(Rows& p) const {
    const int out = mlp.width[mlp.layers];
    float* const y = Advance(mlp.y, (b * mlp.N + first) * out, stored);
    const float *ct = nullptr, *moves = nullptr;
    if constexpr (kBackward) {
      ct = Advance(ArrayAt(mlp.ct.value, mlp.batch, b, stored), first * out, stored);
      moves = plan.dual ? Advance(ArrayAt(mlp.ct.tangent, mlp.batch, b, stored), first * out, stored) : ct;
    }
    const Parameter<V> parameter = ParameterOfActivation(mlp.output_activation);
    EachBlock<false>(mlp.output_activation.kind, BlocksOf(out), p, [&](auto kind, auto dual, int n, float (&h)[4]) {
      int at[4];
      float a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = n * kBlock + 2 * t + (i & 1), row = RowOf(i >> 1);
        at[i] = row < rows && c < out ? row * out + c : -1;
        const float* from = i & 2 ? moves : ct;
        if (kBackward) a[i] = at[i] >= 0 && from != nullptr ? LoadFrom(from, at[i], stored) : 0.0f;
      }
      if constexpr (kBackward) {
        Activate4<decltype(kind)::value, decltype(dual)::value>(parameter, h, a);
      } else {
        Activate4<decltype(kind)::value, decltype(dual)::value>(parameter, h);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (y != nullptr && at[i] >= 0 && (!decltype(dual)::value || i >= 2)) StoreTo(h[i], y, at[i], stored);
        if (kBackward) h[i] = at[i] >= 0 ? a[i] : 0.0f;
      }
      if (kBackward) P::Round(h);
    });
  }

  // ---- The way back, from the gradient in p of the last layer.
  __device__ __forceinline__ void Back(Rows& beta) const {
#pragma unroll 1
    for (int l = mlp.layers - 1; l >= plan.lowest; --l) {
      const bool adds = mlp.weight_bar[l] != nullptr || mlp.bias_bar[l] != nullptr;
      const bool goes_on = l > plan.lowest || (l == 0 && WantsRows(mlp));
      const int in = BlocksOf(mlp.width[l]);
      if (adds) StorePlace(l + 1, beta);
      Rows a = {};
      if (goes_on) Multiply<true>(l, beta, a);
      if (l > 0) {
        float* place = Place(l);
        const int below = kRows / 2 * StrideOf(mlp.width[l]);
        const Parameter<V> parameter = ParameterOfActivation(mlp.activation);
        const bool there[2] = {RowOf(0) < rows, RowOf(1) < rows};
        EachBlock<true>(mlp.activation.kind, in, a, [&](auto kind, auto dual, int n, float (&a)[4]) {
          float two[2][2];
          LoadPair(place + n * kBlock, two[0]), LoadPair(place + n * kBlock + below, two[1]);
          float p[4] = {two[0][0], two[0][1], two[1][0], two[1][1]};
          if (stored != Stored::whole) P::Round(a, stored);
          Activate4<decltype(kind)::value, decltype(dual)::value>(parameter, p, a);
          P::Round(p, stored);
          P::Round(a);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!there[i >> 1]) p[i] = a[i] = 0;  // rows that do not exist add nothing to any sum
          }
          StorePair(place + n * kBlock, p[0], p[1]);
          StorePair(place + n * kBlock + below, p[2], p[3]);
        });
      } else if (goes_on) {
        StoreXBar(a);
      }
      if (adds) {
        __syncthreads();
        if (l == 0) {  // x's place is that of layers that are done
          LoadX(a);
          StorePlace(0, a);
          __syncthreads();
        }
        AddSums(l);
        __syncthreads();
      }
#pragma unroll
      for (int n = 0; n < kBlocks; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) beta[n][i] = a[n][i];
    }
  }

  // ---- Sums over the rows of a tile, in pieces of 16 of what a layer returns by a block of what it takes. A warp has
  // kMany blocks next to each other: of those behind the last it reads what lies there, for nobody.
  __device__ __forceinline__ void AddSums(int l) const {
    constexpr int kMany = 4, kTurns = P::kExact ? 1 : 2;
    const int in = BlocksOf(mlp.width[l]), groups = (BlocksOf(mlp.width[l + 1]) + 1) / 2;
    const int of_beta = StrideOf(mlp.width[l + 1]), of_h = StrideOf(mlp.width[l]);
    const int shares = (in + kMany - 1) / kMany;
    const bool biases = mlp.bias_bar[l] != nullptr;
    float* const to = sums + plan.parameter[l];
    for (int u = warp; u < groups * shares; u += plan.warps) {
      const int o = u / shares, first = (u - o * shares) * kMany;
      const bool adds_beta = biases && first == 0;
      const float* const beta = At(plan.place[l + 1]) + t * of_beta + 2 * kBlock * o + g;
      const float* const h = At(plan.place[l]) + t * of_h + kBlock * first + g;
      // What there is already is asked for before it is wanted.
      float4* const at = reinterpret_cast<float4*>(to + (o * in + first) * kMlpCudaPiece) + Lane();
      float* const at_beta = to + groups * in * kMlpCudaPiece + o * 2 * kBlock + g;
      float4 before[kMany];
#pragma unroll
      for (int n = 0; n < kMany; ++n) {
        before[n] = first + n < in ? at[n * (kMlpCudaPiece / 4)] : make_float4(0, 0, 0, 0);
      }
      const float beta_before[2] = {adds_beta ? at_beta[0] : 0, adds_beta ? at_beta[kBlock] : 0};
      float sum[kMany][4] = {}, of_ones[4] = {};
      const float all[2] = {1.0f, 1.0f}, none[2] = {};
      const typename P::B ones[2] = {P::Make(plan.dual ? none : all), P::Make(all)};
      // Pairs of steps are of rows and, if there are any, their tangents, with which the other factor's rows go.
      const int first_h = plan.dual ? kBlock * of_h : 0, second_h = kBlock * of_h - first_h;
#pragma unroll kTurns
      for (int pair = 0; pair < plan.warps; ++pair) {
        const float* const left = beta + pair * kRows * of_beta;
        const float* const right = h + pair * kRows * of_h;
        typename P::A a[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const float* from = left + k * kBlock * of_beta;
          const float four[4] = {from[0], from[kBlock], from[4 * of_beta], from[4 * of_beta + kBlock]};
          a[k] = P::Make(four);
        }
#pragma unroll
        for (int n = 0; n < kMany; ++n) {
          typename P::B b[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const float* from = right + (k ? second_h : first_h) + n * kBlock;
            const float two[2] = {from[0], from[4 * of_h]};
            b[k] = P::Make(two);
          }
          P::Multiply(sum[n], a, b);
        }
        if (adds_beta) P::Multiply(of_ones, a, ones);
      }
#pragma unroll
      for (int n = 0; n < kMany; ++n) {
        if (first + n >= in) break;
        const float4 x = before[n];
        at[n * (kMlpCudaPiece / 4)] = make_float4(x.x + sum[n][0], x.y + sum[n][1], x.z + sum[n][2], x.w + sum[n][3]);
      }
      if (adds_beta && t == 0) at_beta[0] = beta_before[0] + of_ones[0], at_beta[kBlock] = beta_before[1] + of_ones[2];
    }
  }
};

// The most threads of a block. Of the way forward, two blocks share a multiprocessor.
template <bool kBackward>
inline constexpr int kThreads = kBackward ? 384 : 256;

template <class P, bool kBackward>
__global__ void __launch_bounds__(kThreads<kBackward>, kBackward ? 1 : 2)
    RunTiles(const __grid_constant__ Mlp<float, float> mlp, const __grid_constant__ Plan plan, float* pieces) {
#if __CUDA_ARCH__ >= 800  // others are not served
  extern __shared__ float4 shared[];
  char* const memory = reinterpret_cast<char*>(shared);
  const uint32_t set = blockIdx.x / plan.pieces, part = blockIdx.x - set * plan.pieces;
  const int64_t parameters = plan.parameter[mlp.layers];
  float* const piece = pieces + blockIdx.x * parameters;
  float* const sums = plan.sums_shared ? reinterpret_cast<float*>(memory + plan.sums) : piece;
  Tile<P, kBackward> tile = {mlp, plan, memory, sums, mlp.stored};
  for (int64_t i = threadIdx.x; i < parameters; i += blockDim.x) sums[i] = 0;
  const int rows = plan.warps * kRows / (plan.dual ? 2 : 1);
  const int64_t begin = plan.tiles * part / plan.pieces, end = plan.tiles * (part + 1) / plan.pieces;
  int64_t loaded = -1;
#pragma unroll 1
  for (int64_t n = begin; n < end; ++n) {
    const uint32_t s = static_cast<uint32_t>(n / plan.tiles_of_entry);
    tile.first = (n - s * plan.tiles_of_entry) * rows;
    tile.b = Join(plan.split, set, s);
    tile.rows = static_cast<int>(min(int64_t{rows}, mlp.N - tile.first));
    if (loaded < 0 || (plan.weights_vary && loaded != tile.b)) {
      __syncthreads();
      for (int l = 0; l < mlp.layers; ++l) tile.LoadLayer(l);
      __syncthreads();
      loaded = tile.b;
    }
    float x[kBlocks][4];
    tile.Forward(x);
    tile.Finish(x);
    if constexpr (kBackward) tile.Back(x);
  }
  if (!plan.sums_shared) return;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < parameters; i += blockDim.x) piece[i] = sums[i];
#endif
}

// Adds the blocks' sums, each warp of a block some of them.
constexpr int kAdders = 8;
__global__ void __launch_bounds__(kAdders* kWarp)
    AddPieces(const __grid_constant__ Mlp<float, float> mlp, const __grid_constant__ Plan plan, const float* pieces) {
  __shared__ float part[kAdders][kWarp + 1];
  const int64_t parameters = plan.parameter[mlp.layers];
  const int64_t i = int64_t{blockIdx.x} * kWarp + Lane(), set = blockIdx.y;
  const int w = threadIdx.x / kWarp;
  float sum = 0;
  if (i < parameters) {
#pragma unroll 8
    for (int n = w; n < plan.pieces; n += kAdders) sum += pieces[(set * plan.pieces + n) * parameters + i];
  }
  part[w][Lane()] = sum;
  __syncthreads();
  if (w > 0 || i >= parameters) return;
  for (int n = 1; n < kAdders; ++n) sum += part[n][threadIdx.x];
  int l = 0;
  while (i >= plan.parameter[l + 1]) ++l;
  const int in = mlp.width[l], out = mlp.width[l + 1], blocks = BlocksOf(in), groups = (BlocksOf(out) + 1) / 2;
  const int at = static_cast<int>(i - plan.parameter[l]), block = at / kMlpCudaPiece, entry = at % kMlpCudaPiece;
  if (block < groups * blocks) {
    const int o = block / blocks * 2 * kBlock + entry / 16 + (entry & 2) / 2 * kBlock;
    const int c = block % blocks * kBlock + entry / 4 % 4 * 2 + (entry & 1);
    if (mlp.weight_bar[l] == nullptr || o >= out || c >= in) return;
    StoreTo(sum, Advance(mlp.weight_bar[l], set * out * in, mlp.stored), o * in + c, mlp.stored);
  } else {
    const int o = at - groups * blocks * kMlpCudaPiece;
    if (mlp.bias_bar[l] == nullptr || o >= out) return;
    StoreTo(sum, Advance(mlp.bias_bar[l], set * out, mlp.stored), o, mlp.stored);
  }
}

// ---- Launches.

// Lays out shared memory.
void LayOut(const Mlp<float, float>& mlp, bool backward, Plan& plan) {
  const int L = mlp.layers;
  int64_t bytes = 0;
  const auto take = [&](int64_t numbers) {
    const int64_t at = bytes;
    bytes += CeilDiv(numbers * int64_t{sizeof(float)}, 16) * 16;
    return static_cast<int>(Min(at, int64_t{1} << 30));
  };
  // Places first: sums read some columns behind the last row of one, for what nobody reads.
  const auto place = [&](int l) { plan.place[l] = take(int64_t{plan.warps} * kRows * StrideOf(mlp.width[l])); };
  for (int l = 1; backward && l <= L; ++l) place(l);
  if (backward) {
    // That of x is wanted when nothing but the first layer's is any more.
    const int64_t end = bytes;
    if (L > 1) bytes = plan.place[2];
    place(0);
    bytes = Max(bytes, end);
  }
  for (int l = 0; l < L; ++l) {
    const int64_t numbers = int64_t{BlocksOf(mlp.width[l])} * BlocksOf(mlp.width[l + 1]) * kBlock * kBlock;
    plan.weight[l] = take(numbers);
    if (mlp.weight[l].tangent.data != nullptr) plan.weight_tangent[l] = take(numbers);
    plan.bias[l] = take(BlocksOf(mlp.width[l + 1]) * kBlock);
    if (plan.dual) plan.bias_tangent[l] = take(BlocksOf(mlp.width[l + 1]) * kBlock);
  }
  if (plan.sums_shared) plan.sums = take(plan.parameter[L]);
  if (backward) take(3 * kBlock);  // so that it is not behind the end
  plan.bytes = static_cast<int>(Min(bytes, int64_t{1} << 30));
}

// The first of layouts that fits.
bool Fit(const Mlp<float, float>& mlp, bool backward, int most_warps, int shared, Plan& plan) {
  const bool sums = plan.parameter[mlp.layers] > 0;
  for (plan.warps = most_warps; plan.warps > 0; plan.warps /= 2) {
    for (const bool sums_shared : {true, false}) {
      plan.sums_shared = sums && sums_shared;
      LayOut(mlp, backward, plan);
      if (plan.bytes <= shared) return true;
    }
  }
  return false;
}

void CountSums(const Mlp<float, float>& mlp, Plan& plan) {
  for (int l = 0; l < mlp.layers; ++l) {
    plan.parameter[l + 1] = plan.parameter[l] + MlpCudaSumCount(mlp.width[l], mlp.width[l + 1]);
  }
}

template <class P, bool kBackward>
cudaError_t Launch(const Mlp<float, float>& mlp, float* scratch, int64_t bytes, int multiprocessors, int shared,
                   cudaStream_t stream) {
  Plan plan = {};
  plan.dual = HasTangents(mlp);
  const bool sums = kBackward && WantsSums(mlp);
  Batch kept = mlp.sum_batch;
  if (!sums) {
    for (int a = 0; a < mlp.batch.ndim; ++a) kept.size[a] = 1;
    kept.ndim = mlp.batch.ndim;
  }
  plan.split = Split(mlp.batch, kept);
  const int64_t entries = Count(mlp.batch), sets = Count(kept);
  for (int l = 0; l < mlp.layers; ++l) {
    for (const Input<float>& input : {mlp.weight[l], mlp.bias[l]}) {
      for (int a = 0; a < mlp.batch.ndim; ++a) {
        plan.weights_vary |= input.value.data != nullptr && input.value.stride[a] != 0;
        plan.weights_vary |= input.tangent.data != nullptr && input.tangent.stride[a] != 0;
      }
    }
  }
  if (sums) CountSums(mlp, plan);
  if (kBackward && !WantsRows(mlp)) {
    while (plan.lowest + 1 < mlp.layers && mlp.weight_bar[plan.lowest] == nullptr &&
           mlp.bias_bar[plan.lowest] == nullptr) {
      ++plan.lowest;
    }
  }
  if (sets == 0 || ((entries == 0 || mlp.N == 0) && !sums)) return cudaSuccess;

  // Few rows are dealt out to many small blocks.
  const auto rows_of = [&](int warps) { return warps * kRows / (plan.dual ? 2 : 1); };
  int warps = kThreads<kBackward> / kWarp;
  while (warps > 4 && entries * CeilDiv(mlp.N, rows_of(warps)) < multiprocessors) warps /= 2;
  if (!Fit(mlp, kBackward, warps, shared, plan)) return cudaErrorInvalidConfiguration;
  const auto kernel = RunTiles<P, kBackward>;
  if (cudaError_t error = AllowSharedMemory(kernel, plan.bytes); error != cudaSuccess) return error;
  const int threads = plan.warps * kWarp;
  int resident_blocks = 1;
  if (cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident_blocks, kernel, threads, plan.bytes);
      error != cudaSuccess) {
    return error;
  }
  plan.tiles_of_entry = CeilDiv(mlp.N, rows_of(plan.warps));
  plan.tiles = entries / sets * plan.tiles_of_entry;
  int64_t most = CeilDiv(int64_t{multiprocessors} * std::max(1, resident_blocks), sets);
  if (sums) most = Min(most, Max(1, kMlpCudaPieces / sets));
  plan.pieces = static_cast<int>(Max(1, Min(plan.tiles, most)));
  const int64_t blocks = sets * plan.pieces;
  if (blocks * plan.parameter[mlp.layers] * int64_t{sizeof(float)} > bytes) return cudaErrorMemoryAllocation;
  if (cudaError_t error = CheckGrid(blocks); error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, plan.bytes, stream>>>(mlp, plan, scratch);
  if (sums) {
    const dim3 grid(static_cast<unsigned>(CeilDiv(plan.parameter[mlp.layers], kWarp)), static_cast<unsigned>(sets));
    AddPieces<<<grid, kAdders * kWarp, 0, stream>>>(mlp, plan, scratch);
  }
  return cudaGetLastError();
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

cudaError_t LaunchMlp(const Mlp<float, float>& args, void* scratch, int64_t bytes, cudaStream_t stream) {
  using namespace KNN_ISA;
  int device, multiprocessors, shared;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  const bool backward = WantsSums(args) || WantsRows(args);
  const bool exact = args.stored == Stored::whole && args.precision == ProductPrecision::highest;
  const auto launch = exact      ? backward ? Launch<Floats<true>, true> : Launch<Floats<true>, false>
                      : backward ? Launch<Floats<false>, true>
                                 : Launch<Floats<false>, false>;
  return launch(args, static_cast<float*>(scratch), bytes, multiprocessors, shared, stream);
}

bool MlpCudaServes(const int64_t* width, int layers, int64_t bytes) {
  using namespace KNN_ISA;
  int major = 9, shared = 227 << 10;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) != cudaSuccess) {
    cudaGetLastError();
  }
  if (major < 8 || bytes == 8 || *std::max_element(width, width + layers + 1) > kMlpCudaMaxWidth) return false;
  Mlp<float, float> mlp = {};
  mlp.layers = layers;
  for (int l = 0; l <= layers; ++l) mlp.width[l] = static_cast<int>(width[l]);
  Plan plan = {};
  plan.dual = true;
  // With fewer warps than half of those there may be, XLA is faster.
  constexpr int kWarps = kThreads<true> / kWarp;
  if (!Fit(mlp, /*backward=*/true, kWarps, shared, plan) || plan.warps < kWarps / 2) return false;
  // Tangents of all weights and gradients in all take most.
  static const float there = 0;
  for (int l = 0; l < layers; ++l) mlp.weight[l].tangent.data = &there;
  return Fit(mlp, /*backward=*/true, 1, shared, plan);
}

}  // namespace knn
