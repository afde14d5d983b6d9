// The multilayer perceptron on CUDA.
//
// A block goes through tiles of rows and takes each through all layers, without leaving the chip: forward, and for
// gradients back. What a tile's layers return lies in shared memory, with σ' at each entry, which is all of the way
// forward that the way back needs. Tangents are further rows of a tile: matrices act on them as on values, so that both
// share what is loaded of weights, and only activations tell them apart. Sums over rows are added up over all tiles of
// a block; a second kernel adds those of the blocks in their order.
//
// Products are of matrix units in pieces of 16×16 (mma.sync): TF32, or 16 bits as stored, with sums in float. Float
// proper is three products of TF32, of the leading bits of both factors and of those bits of one with the rest of the
// other. Which entries of a piece a thread holds is free as far as both factors agree: columns and sums are dealt out
// so that a thread reads and writes four neighbouring ones, or two, at a time.

#include <algorithm>
#include <type_traits>

#include "common/cuda.cuh"
#include "mlp/cuda.h"
#include "mlp/formulas.h"

namespace knn::KNN_ISA {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp, kPiece = 16;

// ---- Arithmetic of activations: float by instructions that are as exact as float needs, without the code for
// subnormal numbers. Those that go with products of few bits are less exact.

template <bool kExact>
struct Quick {
  float x;
  static __device__ __forceinline__ Quick Broadcast(double c) { return {static_cast<float>(c)}; }
  friend __device__ __forceinline__ Quick operator+(Quick a, Quick b) { return {a.x + b.x}; }
  friend __device__ __forceinline__ Quick operator-(Quick a, Quick b) { return {a.x - b.x}; }
  friend __device__ __forceinline__ Quick operator*(Quick a, Quick b) { return {a.x * b.x}; }
  friend __device__ __forceinline__ Quick operator/(Quick a, Quick b) { return {__fdividef(a.x, b.x)}; }
  friend __device__ __forceinline__ Quick operator-(Quick a) { return {-a.x}; }
  friend __device__ __forceinline__ Quick Scale(double c, Quick a) { return {static_cast<float>(c) * a.x}; }
  friend __device__ __forceinline__ Quick SelectLess(Quick a, Quick b, Quick less, Quick otherwise) {
    return {a.x < b.x ? less.x : otherwise.x};
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
    float p;
    if constexpr (kExact) {
      p = 0.005253457929939032f;
      p = fmaf(p, t, -0.02958850748836994f);
      p = fmaf(p, t, 0.07836166769266129f);
      p = fmaf(p, t, -0.13674770295619965f);
      p = fmaf(p, t, 0.19111430644989014f);
      p = fmaf(p, t, -0.24844369292259216f);
      p = fmaf(p, t, 0.33319270610809326f);
      p = fmaf(p, t, -0.49999502301216125f);
      p = fmaf(p, t, 1.0f);
    } else {
      p = -0.02397957257926464f;
      p = fmaf(p, t, 0.10150004923343658f);
      p = fmaf(p, t, -0.2102936953306198f);
      p = fmaf(p, t, 0.3252951502799988f);
      p = fmaf(p, t, -0.49937260150909424f);
      p = fmaf(p, t, 0.9999918341636658f);
    }
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
__device__ __forceinline__ double Raw(double x) { return x; }
__device__ __forceinline__ float Raw(float x) { return x; }
template <bool kExact>
__device__ __forceinline__ float Raw(Quick<kExact> x) {
  return x.x;
}

// ---- Matrices in shared memory, of rows that are a multiple of 128 bytes long. Columns are shuffled within a row, by
// the row's number, so that what a warp reads or writes at a time lies in different banks.

template <class E>
__device__ __forceinline__ int Shuffle(int row) {
  if (sizeof(E) == 4) return ((row ^ row >> 1 ^ row >> 2) & 1) << 4 | (row & 8);
  if (sizeof(E) == 2) return (row & 7) << 3;
  return (row & 3) << 2;
}

template <class E>
struct Matrix {
  E* data;
  int stride;
  __device__ __forceinline__ E* At(int row, int column) const {
    return data + row * stride + (column ^ Shuffle<E>(row));
  }
};

__device__ __forceinline__ int Lane() { return threadIdx.x & (kWarp - 1); }

// ---- Kinds of arithmetic. Each has a thread's share of a piece of A, of B and of sums, with `q` and `j` for eight
// rows and four columns that a lane stands for. Of a piece of sums a thread has, in rows RowOf(q, h) for h = 0, 1, the
// columns ColumnOf(j, i) for i = 0 … 3: entry (h, i) is sum[TileOf(i)][2h + EntryOf(i)]. Steps are of kStep in what is
// summed over.

struct Transposed {};  // tag of loads whose rows are what is summed over

// Scalars, for double, and for float where there are no matrix units for it.
template <class T>
struct Scalars {
  using Number = T;
  using Element = T;
  using Activated = T;
  static constexpr int kStep = 1, kLow = 1;
  struct A {
    T x[2];
  };
  struct B {
    T x[4];
  };
  static constexpr __device__ __forceinline__ int TileOf(int i) { return i >> 1; }
  static constexpr __device__ __forceinline__ int EntryOf(int i) { return i & 1; }
  static __device__ __forceinline__ int ColumnOf(int j, int i) { return 4 * j + i; }
  static __device__ __forceinline__ int SumRowOf(int q, int h) { return q + 8 * h; }
  static __device__ __forceinline__ Stored StoredAs(Stored stored) { return stored; }

  static __device__ __forceinline__ T Rounded(T x, Stored stored) {
    if (sizeof(T) == 8 || stored == Stored::whole) return x;
    Float16 narrow;
    Narrow(static_cast<float>(x), stored, &narrow);
    return static_cast<T>(Widen(narrow, stored));
  }
  static __device__ __forceinline__ void Load(A* a, Matrix<T> m, int row, int k) {
    const int q = Lane() >> 2;
    a->x[0] = *m.At(row + q, k), a->x[1] = *m.At(row + q + 8, k);
  }
  static __device__ __forceinline__ void Load(A* a, Matrix<T> m, int k, int column, Transposed) {
    const int q = Lane() >> 2;
    a->x[0] = *m.At(k, column + q), a->x[1] = *m.At(k, column + q + 8);
  }
  static __device__ __forceinline__ void Load(B* b, Matrix<T> m, int row, int k) {
    const int j = Lane() & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) b->x[i] = *m.At(row + 4 * j + i, k);
  }
  static __device__ __forceinline__ void Load(B* b, Matrix<T> m, int k, int column, Transposed) {
    const int j = Lane() & 3;
#pragma unroll
    for (int i = 0; i < 4; ++i) b->x[i] = *m.At(k, column + 4 * j + i);
  }
  static __device__ __forceinline__ void Multiply(T (&sum)[2][4], T (&)[2][4], const A& a, const B& b) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[TileOf(i)][2 * h + EntryOf(i)] += a.x[h] * b.x[i];
    }
  }
  // sum[2h] += the row's sum of A.
  static __device__ __forceinline__ void AddUp(T (&sum)[4], const A& a) { sum[0] += a.x[0], sum[2] += a.x[1]; }
  static __device__ __forceinline__ void StoreQuad(Matrix<T> m, int row, int column, int j, const T (&x)[4], Stored s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) *m.At(row, column + 4 * j + i) = Rounded(x[i], s);
  }
};

// TF32; with kSplit, float. A lane's four columns, or rows, 4j … 4j + 3 of what is summed over are two steps of an
// instruction that takes eight, which has its j and j + 4 there.
template <bool kSplit>
struct Floats {
  using Number = float;
  using Element = float;
  using Activated = Quick<kSplit>;
  static constexpr int kStep = 16, kLow = kSplit ? 2 : 1;
  struct A {
    float x[2][4];
  };
  struct B {
    float x[2][2][2];  // of each half of the columns, and step
  };
  static constexpr __device__ __forceinline__ int TileOf(int i) { return i & 1; }
  static constexpr __device__ __forceinline__ int EntryOf(int i) { return i >> 1; }
  static __device__ __forceinline__ int ColumnOf(int j, int i) { return 4 * j + i; }
  static __device__ __forceinline__ int SumRowOf(int q, int h) { return 2 * q + h; }
  static __device__ __forceinline__ Stored StoredAs(Stored) { return Stored::whole; }

  static __device__ __forceinline__ float ToTf32(float x) {
    uint32_t bits;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
    bits = __float_as_uint(x);
#endif
    return __uint_as_float(bits);
  }
  static __device__ __forceinline__ float Rounded(float x, Stored) { return kSplit ? x : ToTf32(x); }

  static __device__ __forceinline__ void Load(A* a, Matrix<float> m, int row, int k) {
    const int q = Lane() >> 2, j = Lane() & 3;
    const float4 u = *reinterpret_cast<const float4*>(m.At(row + q, k + 4 * j));
    const float4 v = *reinterpret_cast<const float4*>(m.At(row + q + 8, k + 4 * j));
    *a = {{{u.x, v.x, u.y, v.y}, {u.z, v.z, u.w, v.w}}};
  }
  static __device__ __forceinline__ void Load(A* a, Matrix<float> m, int k, int column, Transposed) {
    const int q = Lane() >> 2, j = Lane() & 3;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float2 u = *reinterpret_cast<const float2*>(m.At(k + 4 * j + t, column + 2 * q));
      a->x[t >> 1][(t & 1) * 2] = u.x, a->x[t >> 1][(t & 1) * 2 + 1] = u.y;
    }
  }
  static __device__ __forceinline__ void Load(B* b, Matrix<float> m, int row, int k) {
    const int q = Lane() >> 2, j = Lane() & 3;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float4 u = *reinterpret_cast<const float4*>(m.At(row + 2 * q + c, k + 4 * j));
      b->x[c][0][0] = u.x, b->x[c][0][1] = u.y, b->x[c][1][0] = u.z, b->x[c][1][1] = u.w;
    }
  }
  static __device__ __forceinline__ void Load(B* b, Matrix<float> m, int k, int column, Transposed) {
    const int q = Lane() >> 2, j = Lane() & 3;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const float2 u = *reinterpret_cast<const float2*>(m.At(k + 4 * j + t, column + 2 * q));
      b->x[0][t >> 1][t & 1] = u.x, b->x[1][t >> 1][t & 1] = u.y;
    }
  }
  static __device__ __forceinline__ void Mma(float (&sum)[4], const float (&a)[4], float b0, float b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
  }
  static __device__ __forceinline__ void Split(const float (&x)[4], float (&high)[4], float (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) high[i] = ToTf32(x[i]), low[i] = x[i] - high[i];
  }
  // Matrix units add without rounding to nearest, so that what is small is summed apart.
  static __device__ __forceinline__ void Multiply(float (&sum)[2][4], float (&low_sum)[2][4], const A& a, const B& b) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      if constexpr (kSplit) {
        float high[4], low[4];
        Split(a.x[step], high, low);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float b0 = ToTf32(b.x[c][step][0]), b1 = ToTf32(b.x[c][step][1]);
          Mma(sum[c], high, b0, b1);
          Mma(low_sum[c], high, b.x[c][step][0] - b0, b.x[c][step][1] - b1);
          Mma(low_sum[c], low, b0, b1);
        }
      } else {
#pragma unroll
        for (int c = 0; c < 2; ++c) Mma(sum[c], a.x[step], b.x[c][step][0], b.x[c][step][1]);
      }
    }
  }
  static __device__ __forceinline__ void AddUp(float (&sum)[4], const A& a) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      if constexpr (kSplit) {
        float high[4], low[4];
        Split(a.x[step], high, low);
        Mma(sum, low, 1, 1);
        Mma(sum, high, 1, 1);
      } else {
        Mma(sum, a.x[step], 1, 1);
      }
    }
  }
  static __device__ __forceinline__ void StoreQuad(Matrix<float> m, int row, int column, int j, const float (&x)[4],
                                                   Stored s) {
    *reinterpret_cast<float4*>(m.At(row, column + 4 * j)) =
        make_float4(Rounded(x[0], s), Rounded(x[1], s), Rounded(x[2], s), Rounded(x[3], s));
  }
};

// 16 bits.
template <Stored kStored>
struct Halves {
  using Number = float;
  using Element = uint16_t;
  using Activated = Quick<false>;
  static constexpr int kStep = 16, kLow = 1;
  struct A {
    uint32_t x[4];
  };
  struct B {
    uint32_t x[2][2];
  };
  static constexpr __device__ __forceinline__ int TileOf(int i) { return i >> 1; }
  static constexpr __device__ __forceinline__ int EntryOf(int i) { return i & 1; }
  static __device__ __forceinline__ int ColumnOf(int j, int i) { return 8 * (i >> 1) + 2 * j + (i & 1); }
  static __device__ __forceinline__ int SumRowOf(int q, int h) { return q + 8 * h; }
  static __device__ __forceinline__ Stored StoredAs(Stored) { return kStored; }

  static __device__ __forceinline__ uint32_t Pack(float low, float high) {
    uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
    if constexpr (kStored == Stored::bfloat16) {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    } else {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    }
#endif
    return bits;
  }
  static __device__ __forceinline__ uint16_t Rounded(float x, Stored) { return static_cast<uint16_t>(Pack(x, 0)); }
  // Four pieces of 8×8, of which a lane says where one row begins.
  template <bool kTransposed>
  static __device__ __forceinline__ void LoadPieces(uint32_t (&x)[4], const uint16_t* row) {
#if __CUDA_ARCH__ >= 800
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(at)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(at)
                   : "memory");
    }
#endif
  }
  static __device__ __forceinline__ void Load(A* a, Matrix<uint16_t> m, int row, int k) {
    const int lane = Lane();
    LoadPieces<false>(a->x, m.At(row + (lane & 15), k + (lane >> 4) * 8));
  }
  static __device__ __forceinline__ void Load(A* a, Matrix<uint16_t> m, int k, int column, Transposed) {
    const int lane = Lane();
    LoadPieces<true>(a->x, m.At(k + (lane & 7) + (lane >> 4) * 8, column + (lane & 8)));
  }
  static __device__ __forceinline__ void Load(B* b, Matrix<uint16_t> m, int row, int k) {
    const int lane = Lane();
    uint32_t x[4];
    LoadPieces<false>(x, m.At(row + (lane & 7) + (lane >> 4) * 8, k + (lane & 8)));
    b->x[0][0] = x[0], b->x[0][1] = x[1], b->x[1][0] = x[2], b->x[1][1] = x[3];
  }
  static __device__ __forceinline__ void Load(B* b, Matrix<uint16_t> m, int k, int column, Transposed) {
    const int lane = Lane();
    uint32_t x[4];
    LoadPieces<true>(x, m.At(k + (lane & 15), column + (lane >> 4) * 8));
    b->x[0][0] = x[0], b->x[0][1] = x[1], b->x[1][0] = x[2], b->x[1][1] = x[3];
  }
  static __device__ __forceinline__ void Mma(float (&sum)[4], const A& a, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    if constexpr (kStored == Stored::bfloat16) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
          : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b0), "r"(b1));
    }
#endif
  }
  static __device__ __forceinline__ void Multiply(float (&sum)[2][4], float (&)[2][4], const A& a, const B& b) {
    Mma(sum[0], a, b.x[0][0], b.x[0][1]);
    Mma(sum[1], a, b.x[1][0], b.x[1][1]);
  }
  static __device__ __forceinline__ void AddUp(float (&sum)[4], const A& a) {
    constexpr uint32_t kOnes = kStored == Stored::bfloat16 ? 0x3f803f80u : 0x3c003c00u;
    Mma(sum, a, kOnes, kOnes);
  }
  static __device__ __forceinline__ void StoreQuad(Matrix<uint16_t> m, int row, int column, int j, const float (&x)[4],
                                                   Stored) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      *reinterpret_cast<uint32_t*>(m.At(row, column + 8 * c + 2 * j)) = Pack(x[2 * c], x[2 * c + 1]);
    }
  }
};

// ---- Products of a warp.

enum class Product { forward, back, sums };  // A Bᵀ, A B, Aᵀ B

// Adds to `sum` the product of rows row[s] … + 15 of A with 16·groups columns from `column` on. Of Aᵀ B those rows are
// columns, and what is summed over are rows k of A and k ^ flip of B; `ones`, if given, adds up A's from ones_from on.
template <class P, Product kind, int kGroups, int kSets, class T = typename P::Number, class E = typename P::Element>
__device__ __forceinline__ void Multiply(T (&sum)[kGroups][kSets][2][4], Matrix<E> a, const int (&row)[kSets], int sets,
                                         Matrix<E> b, int column, int groups, int size, int flip = 0,
                                         T (*ones)[4] = nullptr, int ones_from = 0) {
  T low[P::kLow == 2 ? kGroups : 1][P::kLow == 2 ? kSets : 1][2][4] = {};
#pragma unroll 1
  for (int k = 0; k < size; k += P::kStep) {
    typename P::A x[kSets];
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      if (s > 0 && s >= sets) continue;
      if constexpr (kind == Product::sums) {
        P::Load(&x[s], a, k, row[s], Transposed());
        if (ones != nullptr && k >= ones_from) P::AddUp(ones[s], x[s]);
      } else {
        P::Load(&x[s], a, row[s], k);
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g > 0 && g >= groups) continue;
      typename P::B y;
      if constexpr (kind == Product::forward) {
        P::Load(&y, b, column + g * kPiece, k);
      } else {
        P::Load(&y, b, k ^ flip, column + g * kPiece, Transposed());
      }
#pragma unroll
      for (int s = 0; s < kSets; ++s) {
        if (s > 0 && s >= sets) continue;
        P::Multiply(sum[g][s], low[P::kLow == 2 ? g : 0][P::kLow == 2 ? s : 0], x[s], y);
      }
    }
  }
  if constexpr (P::kLow == 2) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int s = 0; s < kSets; ++s)
#pragma unroll
        for (int c = 0; c < 2; ++c)
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[g][s][c][i] += low[g][s][c][i];
  }
}

// ---- Reading and writing arrays.

template <class T>
__device__ __forceinline__ T LoadFrom(const T* data, int i, Stored stored) {
  if (sizeof(T) == 8 || stored == Stored::whole) return data[i];
  return static_cast<T>(Widen(Float16{reinterpret_cast<const uint16_t*>(data)[i]}, stored));
}
template <class T>
__device__ __forceinline__ void StoreTo(T x, T* data, int i, Stored stored) {
  if (sizeof(T) == 8 || stored == Stored::whole) {
    data[i] = x;
  } else {
    Narrow(static_cast<float>(x), stored, reinterpret_cast<Float16*>(data) + i);
  }
}
// data + i, or null, and what At returns, for arrays whose elements may have 16 bits. T may be const.
template <class T>
__device__ __forceinline__ T* Advance(T* data, int64_t i, Stored stored) {
  if (data == nullptr) return nullptr;
  if (sizeof(T) == 8 || stored == Stored::whole) return data + i;
  using Bits = std::conditional_t<std::is_const_v<T>, const uint16_t, uint16_t>;
  return reinterpret_cast<T*>(reinterpret_cast<Bits*>(data) + i);
}
template <class T>
__device__ __forceinline__ const T* ArrayAt(const Operand<const T>& operand, const Batch& batch, int64_t b, Stored s) {
  if (operand.data == nullptr) return nullptr;
  return Advance(operand.data, At(operand, batch, b) - operand.data, s);
}

// ---- What a block does.

// Where things lie in shared memory, by bytes, and how work is divided.
struct Plan {
  int rows;           // of a tile; with tangents as many rows again follow
  bool resident;      // all weights are in shared memory, rather than one layer's at a time
  bool sums_shared;   // so are sums of gradients, rather than in scratch
  bool kept;          // layers of a tile are in scratch, and in shared memory one at a time
  bool weights_vary;  // between batch entries
  int lowest;         // the first layer whose gradients are wanted, of weights or x
  int pieces;         // blocks that share in a sum
  int bytes;
  int weight[kMaxLayers], weight_tangent[kMaxLayers], bias[kMaxLayers], bias_tangent[kMaxLayers];
  int sum[kMaxLayers], bias_sum[kMaxLayers];
  int h[kMaxLayers], slope[kMaxLayers];       // what a layer takes; σ' and σ'' ṗ of what it returns
  int delta[2];                               // the gradient in p, of layers in turn
  int64_t parameter[kMaxLayers];              // where a layer's begin, in a piece of the sums
  int64_t parameters, tiles_of_entry, tiles;  // of a piece
  int64_t keep, keep_of_block;                // bytes of scratch before what is kept, and of a block's
  SplitBatch split;
};

__device__ __forceinline__ int Padded(int width) { return (width + kPiece - 1) & -kPiece; }
template <class E>
__host__ __device__ __forceinline__ int StrideOf(int width) {
  constexpr int kUnit = 128 / sizeof(E);
  return (width + kUnit - 1) / kUnit * kUnit;
}

// Copies `rows` × `columns` numbers into a matrix from `column` on, zero up to padded_rows and padded_columns.
template <class P, class T = typename P::Number>
__device__ __forceinline__ void CopyIn(Matrix<typename P::Element> to, int row, int column, const T* from, int rows,
                                       int columns, int padded_rows, int padded_columns, Stored stored) {
  for (int c = threadIdx.x & (kPiece - 1); c < padded_columns; c += kPiece) {
#pragma unroll 4
    for (int r = threadIdx.x / kPiece; r < padded_rows; r += kThreads / kPiece) {
      const bool exists = from != nullptr && r < rows && c < columns;
      const T x = exists ? LoadFrom(from, r * columns + c, stored) : T(0);
      *to.At(row + r, column + c) = P::Rounded(x, stored);
    }
  }
}

template <class P, bool kDual, bool kBackward>
struct Block {
  using T = typename P::Number;
  using E = typename P::Element;
  using V = typename P::Activated;
  static constexpr int kGroups = kBackward ? 1 : 2;

  const Mlp<T, T>& mlp;
  const Plan& plan;
  char* memory;
  T* piece;
  char* keep;
  int span;  // rows of a tile, those of tangents too
  Stored stored;

  __device__ __forceinline__ Matrix<E> Elements(int at, int width) const {
    return {reinterpret_cast<E*>(memory + at), StrideOf<E>(width)};
  }
  __device__ __forceinline__ Matrix<T> Numbers(int at, int width) const {
    return {reinterpret_cast<T*>(memory + at), StrideOf<T>(width)};
  }
  __device__ __forceinline__ int widest() const {
    int width = 0;
    for (int l = 0; l <= mlp.layers; ++l) width = max(width, mlp.width[l]);
    return width;
  }

  __device__ __forceinline__ void LoadLayer(int l, int64_t b) const {
    const int in = mlp.width[l], out = mlp.width[l + 1];
    const T* weight = ArrayAt(mlp.weight[l].value, mlp.batch, b, stored);
    CopyIn<P>(Elements(plan.weight[l], in), 0, 0, weight, out, in, Padded(out), Padded(in), stored);
    const T* bias = ArrayAt(mlp.bias[l].value, mlp.batch, b, stored);
    auto* biases = reinterpret_cast<T*>(memory + plan.bias[l]);
    for (int o = threadIdx.x; o < Padded(out); o += kThreads) {
      biases[o] = bias != nullptr && o < out ? LoadFrom(bias, o, stored) : T(0);
    }
    if constexpr (kDual) {
      const T* moves = ArrayAt(mlp.weight[l].tangent, mlp.batch, b, stored);
      if (moves != nullptr) {
        CopyIn<P>(Elements(plan.weight_tangent[l], in), 0, 0, moves, out, in, Padded(out), Padded(in), stored);
      }
      const T* bias_moves = ArrayAt(mlp.bias[l].tangent, mlp.batch, b, stored);
      auto* tangents = reinterpret_cast<T*>(memory + plan.bias_tangent[l]);
      for (int o = threadIdx.x; o < Padded(out); o += kThreads) {
        tangents[o] = bias_moves != nullptr && o < out ? LoadFrom(bias_moves, o, stored) : T(0);
      }
    }
  }

  __device__ __forceinline__ void LoadTile(int64_t b, int64_t first, int rows) const {
    const Matrix<E> x = Elements(plan.h[0], mlp.width[0]);
    for (int part = 0, column = 0; part < mlp.parts; column += mlp.part_width[part++]) {
      const int width = mlp.part_width[part];
      const int padded = part + 1 < mlp.parts ? width : Padded(mlp.width[0]) - column;
      const T* value = ArrayAt(mlp.x[part].value, mlp.batch, b, stored);
      const int64_t at = first * width;
      CopyIn<P>(x, 0, column, Advance(value, at, stored), rows, width, plan.rows, padded, stored);
      if constexpr (kDual) {
        const T* tangent = ArrayAt(mlp.x[part].tangent, mlp.batch, b, stored);
        CopyIn<P>(x, plan.rows, column, Advance(tangent, at, stored), rows, width, plan.rows, padded, stored);
      }
    }
  }

  // A unit is 32 rows, of which with tangents half are those of the other half, by 16·kGroups columns.
  struct Unit {
    int row[2], column, groups;
  };
  __device__ __forceinline__ int Units(int width) const {
    return span / 32 * ((Padded(width) + kPiece * kGroups - 1) / (kPiece * kGroups));
  }
  __device__ __forceinline__ Unit UnitOf(int u, int width) const {
    const int row_groups = span / 32, c = u / row_groups, r = u - c * row_groups;
    const int left = Padded(width) / kPiece - c * kGroups;
    const int first = kDual ? 16 * r : 32 * r;
    return {{first, first + (kDual ? plan.rows : 16)}, c * kGroups * kPiece, min(left, kGroups)};
  }

  // σ of what a thread holds of two rows, in the place of p: with tangents of a value and its tangent.
  static __device__ __forceinline__ void ActivateQuads(ActivationKind kind, Parameter<V> parameter, T (&p)[2][4],
                                                       T (&slope)[2][4]) {
    WithKind(kind, [&](auto k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Jet<V> jet = Activate<decltype(k)::value>(V{p[0][i]}, parameter);
        p[0][i] = Raw(jet.value), slope[0][i] = Raw(jet.slope);
        if constexpr (kDual) {
          slope[1][i] = Raw(jet.bend) * p[1][i];
          p[1][i] *= slope[0][i];
        } else {
          const Jet<V> other = Activate<decltype(k)::value>(V{p[1][i]}, parameter);
          p[1][i] = Raw(other.value), slope[1][i] = Raw(other.slope);
        }
      }
    });
  }

  // Layer l of a tile of `rows` rows from `first` on.
  __device__ __forceinline__ void Forward(int l, int64_t b, int64_t first, int rows) const {
    const int in = mlp.width[l], out = mlp.width[l + 1];
    const bool last = l + 1 == mlp.layers;
    const Matrix<E> h = Elements(plan.h[l], in), weight = Elements(plan.weight[l], in);
    const Activation activation = last ? mlp.output_activation : mlp.activation;
    const Parameter<V> parameter = {V{static_cast<T>(activation.parameter)},
                                    V{static_cast<T>(1) / static_cast<T>(activation.parameter)}};
    const int q = Lane() >> 2, j = Lane() & 3;
    for (int u = threadIdx.x / kWarp; u < Units(out); u += kWarps) {
      const Unit unit = UnitOf(u, out);
      T sum[kGroups][2][2][4] = {};
      Multiply<P, Product::forward, kGroups, 2>(sum, h, unit.row, 2, weight, unit.column, unit.groups, Padded(in));
      if constexpr (kDual) {
        if (mlp.weight[l].tangent.data != nullptr) {
          T more[kGroups][1][2][4] = {};
          const int row[1] = {unit.row[0]};
          Multiply<P, Product::forward, kGroups, 1>(more, h, row, 1, Elements(plan.weight_tangent[l], in), unit.column,
                                                    unit.groups, Padded(in));
          AddToTangent(sum, more);
        }
      }
      T p[2 * kGroups][2][4];
      Rows(sum, p);
#pragma unroll 1
      for (int i = 0; i < 2 * unit.groups; ++i) {
        const int column = unit.column + (i >> 1) * kPiece;
        const int row[2] = {unit.row[0] + q + 8 * (i & 1), unit.row[1] + q + 8 * (i & 1)};
        AddBias(l, column, j, p[0]);
        T slope[2][4];
        ActivateQuads(activation.kind, parameter, p[0], slope);
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          if ((kDual ? row[0] : row[s]) < rows) continue;  // rows that do not exist add nothing to any sum
#pragma unroll
          for (int n = 0; n < 4; ++n) p[0][s][n] = slope[s][n] = 0;
        }
        if (last) {
          Finish(column, j, row, b, first, rows, p[0], slope);
        } else {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            P::StoreQuad(Elements(plan.h[l + 1], out), row[s], column, j, p[0][s], stored);
            if constexpr (kBackward) StoreNumbers(Numbers(plan.slope[l], out), row[s], column, j, slope[s]);
          }
        }
#pragma unroll
        for (int n = 1; n < 2 * kGroups; ++n) {
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int m = 0; m < 4; ++m) p[n - 1][s][m] = p[n][s][m];
        }
      }
    }
  }

  // What a thread holds, by rows.
  static __device__ __forceinline__ void Rows(const T (&sum)[kGroups][2][2][4], T (&p)[2 * kGroups][2][4]) {
#pragma unroll
    for (int n = 0; n < 2 * kGroups; ++n)
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[n][s][i] = sum[n >> 1][s][P::TileOf(i)][2 * (n & 1) + P::EntryOf(i)];
  }
  static __device__ __forceinline__ void AddToTangent(T (&sum)[kGroups][2][2][4], const T (&more)[kGroups][1][2][4]) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[g][1][c][i] += more[g][0][c][i];
  }
  __device__ __forceinline__ void AddBias(int l, int column, int j, T (&p)[2][4]) const {
    const T* bias = reinterpret_cast<const T*>(memory + plan.bias[l]) + column;
    const T* tangent = kDual ? reinterpret_cast<const T*>(memory + plan.bias_tangent[l]) + column : bias;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      p[0][i] += bias[P::ColumnOf(j, i)];
      p[1][i] += tangent[P::ColumnOf(j, i)];
    }
  }
  // Numbers that the same thread reads again.
  static __device__ __forceinline__ void StoreNumbers(Matrix<T> m, int row, int column, int j, const T (&x)[4]) {
    T* at = m.At(row, column + 4 * j);
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(at) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
      for (int i = 0; i < 4; ++i) at[i] = x[i];
    }
  }
  static __device__ __forceinline__ void LoadNumbers(Matrix<T> m, int row, int column, int j, T (&x)[4]) {
    const T* at = m.At(row, column + 4 * j);
    if constexpr (sizeof(T) == 4) {
      const float4 all = *reinterpret_cast<const float4*>(at);
      x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
    } else {
      for (int i = 0; i < 4; ++i) x[i] = at[i];
    }
  }

  // The last layer: writes y, and begins the way back.
  __device__ __forceinline__ void Finish(int column, int j, const int (&row)[2], int64_t b, int64_t first, int rows,
                                         const T (&h)[2][4], const T (&slope)[2][4]) const {
    const int out = mlp.width[mlp.layers];
    if (mlp.y != nullptr) {
      T* const y = Advance(mlp.y, (b * mlp.N + first) * out, stored);
#pragma unroll
      for (int s = kDual ? 1 : 0; s < 2; ++s) {
        const int r = kDual ? row[0] : row[s];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = column + P::ColumnOf(j, i);
          if (r < rows && c < out) StoreTo(h[s][i], y, r * out + c, stored);
        }
      }
    }
    if constexpr (kBackward) {
      const T* ct = Advance(ArrayAt(mlp.ct.value, mlp.batch, b, stored), first * out, stored);
      const T* moves = kDual ? Advance(ArrayAt(mlp.ct.tangent, mlp.batch, b, stored), first * out, stored) : nullptr;
      T delta[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = column + P::ColumnOf(j, i);
        if constexpr (kDual) {
          const bool exists = row[0] < rows && c < out;
          const int at = row[0] * out + c;
          const T a = exists ? LoadFrom(ct, at, stored) : T(0);
          const T da = exists && moves != nullptr ? LoadFrom(moves, at, stored) : T(0);
          delta[0][i] = a * slope[0][i];
          delta[1][i] = da * slope[0][i] + a * slope[1][i];
        } else {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const bool exists = row[s] < rows && c < out;
            delta[s][i] = exists ? LoadFrom(ct, row[s] * out + c, stored) * slope[s][i] : T(0);
          }
        }
      }
      const Matrix<E> to = Elements(plan.delta[mlp.layers - 1 & 1], widest());
#pragma unroll
      for (int s = 0; s < 2; ++s) P::StoreQuad(to, row[s], column, j, delta[s], stored);
    }
  }

  // From the gradient in what layer l returns, before its activation, to that of the layer below, or in x.
  __device__ __forceinline__ void Back(int l, int64_t b, int64_t first, int rows) const {
    const int in = mlp.width[l], out = mlp.width[l + 1];
    const Matrix<E> delta = Elements(plan.delta[l & 1], widest()), weight = Elements(plan.weight[l], in);
    const int q = Lane() >> 2, j = Lane() & 3;
    for (int u = threadIdx.x / kWarp; u < Units(in); u += kWarps) {
      const Unit unit = UnitOf(u, in);
      T sum[kGroups][2][2][4] = {};
      Multiply<P, Product::back, kGroups, 2>(sum, delta, unit.row, 2, weight, unit.column, unit.groups, Padded(out));
      if constexpr (kDual) {
        if (mlp.weight[l].tangent.data != nullptr) {
          T more[kGroups][1][2][4] = {};
          const int row[1] = {unit.row[0]};
          Multiply<P, Product::back, kGroups, 1>(more, delta, row, 1, Elements(plan.weight_tangent[l], in), unit.column,
                                                 unit.groups, Padded(out));
          AddToTangent(sum, more);
        }
      }
      T a[2 * kGroups][2][4];
      Rows(sum, a);
#pragma unroll
      for (int n = 0; n < 2 * kGroups; ++n) {
        if (n >= 2 * unit.groups) continue;
        const int column = unit.column + (n >> 1) * kPiece;
        const int row[2] = {unit.row[0] + q + 8 * (n & 1), unit.row[1] + q + 8 * (n & 1)};
        if (l == 0) {
          StoreRowGradient(column, j, row, b, first, rows, a[n]);
          continue;
        }
        T slope[2][4], below[2][4];
#pragma unroll
        for (int s = 0; s < 2; ++s) LoadNumbers(Numbers(plan.slope[l - 1], in), row[s], column, j, slope[s]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          below[0][i] = a[n][0][i] * slope[0][i];
          below[1][i] = kDual ? a[n][1][i] * slope[0][i] + a[n][0][i] * slope[1][i] : a[n][1][i] * slope[1][i];
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          P::StoreQuad(Elements(plan.delta[l - 1 & 1], widest()), row[s], column, j, below[s], stored);
        }
      }
    }
  }

  __device__ __forceinline__ void StoreRowGradient(int column, int j, const int (&row)[2], int64_t b, int64_t first,
                                                   int rows, const T (&a)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int part = 0, c = column + P::ColumnOf(j, i);
      while (part < mlp.parts && c >= mlp.part_width[part]) c -= mlp.part_width[part++];
      if (part == mlp.parts || mlp.x_bar[part] == nullptr) continue;
      const int width = mlp.part_width[part];
      T* const to = Advance(mlp.x_bar[part], (b * mlp.N + first) * width, stored);
#pragma unroll
      for (int s = kDual ? 1 : 0; s < 2; ++s) {
        const int r = kDual ? row[0] : row[s];
        if (r < rows) StoreTo(a[s][i], to, r * width + c, stored);
      }
    }
  }

  // Adds a tile's part of the gradients in a layer's weight and bias.
  __device__ __forceinline__ void AddSums(int l) const {
    const int in = mlp.width[l], out = mlp.width[l + 1], row_pieces = Padded(out) / kPiece;
    const int columns = Padded(in) / kPiece;
    const int sets = (row_pieces + 1) / 2 * columns < kWarps ? 1 : 2, heights = (row_pieces + sets - 1) / sets;
    const Matrix<E> delta = Elements(plan.delta[l & 1], widest()), h = Elements(plan.h[l], in);
    const int q = Lane() >> 2, j = Lane() & 3;
    for (int u = threadIdx.x / kWarp; u < heights * columns; u += kWarps) {
      const int column = u / heights * kPiece, o0 = u % heights * sets * kPiece;
      const int row[2] = {o0, o0 + kPiece}, exist = min(sets, row_pieces - u % heights * sets);
      const bool ones = column == 0;
      T sum[1][2][2][4] = {}, bias[2][4] = {};
      Multiply<P, Product::sums, 1, 2>(sum, delta, row, exist, h, column, 1, span, kDual ? plan.rows : 0,
                                       ones ? bias : nullptr, kDual ? plan.rows : 0);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (s >= exist) continue;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int o = row[s] + P::SumRowOf(q, n);
          T x[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) x[i] = sum[0][s][P::TileOf(i)][2 * n + P::EntryOf(i)];
          if (plan.sums_shared) {
            T before[4];
            LoadNumbers(Numbers(plan.sum[l], in), o, column, j, before);
#pragma unroll
            for (int i = 0; i < 4; ++i) x[i] += before[i];
            StoreNumbers(Numbers(plan.sum[l], in), o, column, j, x);
            if (ones && j == 0) reinterpret_cast<T*>(memory + plan.bias_sum[l])[o] += bias[s][2 * n];
          } else if (o < out) {
            T* to = piece + plan.parameter[l];
            for (int i = 0; i < 4; ++i) {
              const int c = column + P::ColumnOf(j, i);
              if (c < in) to[o * in + c] += x[i];
            }
            if (ones && j == 0) to[out * in + o] += bias[s][2 * n];
          }
        }
      }
    }
  }

  // Copies what layer l takes, and σ' of that, to what is kept of the tile, or back. A thread reads what it wrote.
  __device__ __forceinline__ void Keep(int l, bool back) const {
    const int width = mlp.width[l];
    char* kept = keep;
    for (int k = 0; k < l; ++k) kept += MlpCudaKeptBytes(mlp.width[k], k, sizeof(T));
    const auto copy = [&](int at, int bytes) {
      auto* here = reinterpret_cast<float4*>(memory + at);
      auto* there = reinterpret_cast<float4*>(kept);
      for (int i = threadIdx.x; i < bytes / 16; i += kThreads) {
        if (back) {
          here[i] = there[i];
        } else {
          there[i] = here[i];
        }
      }
      kept += bytes;
    };
    copy(plan.h[l], span * StrideOf<E>(width) * sizeof(E));
    if (l > 0) copy(plan.slope[l - 1], span * StrideOf<T>(width) * sizeof(T));
  }

  __device__ __forceinline__ void ClearSums() const {
    if (plan.sums_shared) {
      for (int l = plan.lowest; l < mlp.layers; ++l) {
        const int in = mlp.width[l], out = Padded(mlp.width[l + 1]);
        auto* sums = reinterpret_cast<T*>(memory + plan.sum[l]);
        for (int i = threadIdx.x; i < out * StrideOf<T>(in); i += kThreads) sums[i] = 0;
        for (int i = threadIdx.x; i < out; i += kThreads) reinterpret_cast<T*>(memory + plan.bias_sum[l])[i] = 0;
      }
    } else {
      for (int64_t i = threadIdx.x; i < plan.parameters; i += kThreads) piece[i] = 0;
    }
  }
  __device__ __forceinline__ void WriteSums() const {
    if (!plan.sums_shared) return;
    for (int l = plan.lowest; l < mlp.layers; ++l) {
      const int in = mlp.width[l], out = mlp.width[l + 1], padded = Padded(in);
      T* to = piece + plan.parameter[l];
      for (int i = threadIdx.x; i < out * padded; i += kThreads) {
        const int o = i / padded, at = i - o * padded;
        const int column = (at & -kPiece) + P::ColumnOf((at & (kPiece - 1)) >> 2, at & 3);
        if (column < in) to[o * in + column] = *Numbers(plan.sum[l], in).At(o, at);
      }
      for (int o = threadIdx.x; o < out; o += kThreads) {
        to[out * in + o] = reinterpret_cast<T*>(memory + plan.bias_sum[l])[o];
      }
    }
  }
};

template <class P, bool kDual, bool kBackward, class T = typename P::Number>
__global__ void __launch_bounds__(kThreads, kBackward ? 1 : 2)
    RunTiles(const __grid_constant__ Mlp<T, T> mlp, const __grid_constant__ Plan plan, T* pieces) {
#if __CUDA_ARCH__ < 800
  if constexpr (!std::is_same_v<P, Scalars<T>>) return;  // not launched
#endif
  extern __shared__ float4 shared[];
  const uint32_t set = blockIdx.x / plan.pieces, part = blockIdx.x - set * plan.pieces;
  const Block<P, kDual, kBackward> block = {
      mlp,
      plan,
      reinterpret_cast<char*>(shared),
      pieces + blockIdx.x * plan.parameters,
      reinterpret_cast<char*>(pieces) + plan.keep + blockIdx.x * plan.keep_of_block,
      plan.rows * (kDual ? 2 : 1),
      P::StoredAs(mlp.stored)};
  const bool sums = kBackward && plan.parameters > 0;
  if (sums) block.ClearSums();
  const int64_t begin = plan.tiles * part / plan.pieces, end = plan.tiles * (part + 1) / plan.pieces;
  int64_t loaded = -1;
#pragma unroll 1
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint32_t s = static_cast<uint32_t>(tile / plan.tiles_of_entry);
    const int64_t first = (tile - s * plan.tiles_of_entry) * plan.rows, b = Join(plan.split, set, s);
    const int rows = static_cast<int>(min(int64_t{plan.rows}, mlp.N - first));
    if (plan.resident && (loaded < 0 || (plan.weights_vary && loaded != b))) {
      for (int l = 0; l < mlp.layers; ++l) block.LoadLayer(l, b);
      loaded = b;
    }
    block.LoadTile(b, first, rows);
    __syncthreads();
#pragma unroll 1
    for (int l = 0; l < mlp.layers; ++l) {
      if (kBackward && plan.kept) block.Keep(l, false);
      if (!plan.resident) block.LoadLayer(l, b);
      if (!plan.resident || plan.kept) __syncthreads();
      block.Forward(l, b, first, rows);
      __syncthreads();
    }
    if constexpr (kBackward) {
#pragma unroll 1
      for (int l = mlp.layers - 1; l >= plan.lowest; --l) {
        const bool goes_on = l > plan.lowest || (l == 0 && WantsRows(mlp));
        if (l + 1 < mlp.layers && !(plan.resident && !plan.kept)) {
          if (plan.kept) block.Keep(l, true);
          if (!plan.resident && goes_on) block.LoadLayer(l, b);
          __syncthreads();
        }
        if (goes_on) block.Back(l, b, first, rows);
        if (mlp.weight_bar[l] != nullptr || mlp.bias_bar[l] != nullptr) block.AddSums(l);
        __syncthreads();
      }
    }
  }
  if (sums) {
    __syncthreads();
    block.WriteSums();
  }
}

// Adds the blocks' sums, each thread of a warp a few of them.
template <class T>
__global__ void __launch_bounds__(kThreads)
    AddPieces(const __grid_constant__ Mlp<T, T> mlp, const __grid_constant__ Plan plan, const T* pieces) {
  __shared__ T part[kWarps][kWarp + 1];
  const int64_t i = int64_t{blockIdx.x} * kWarp + (threadIdx.x & (kWarp - 1)), set = blockIdx.y;
  const int w = threadIdx.x / kWarp;
  T sum = 0;
  if (i < plan.parameters) {
#pragma unroll 4
    for (int n = w; n < plan.pieces; n += kWarps) sum += pieces[(set * plan.pieces + n) * plan.parameters + i];
  }
  part[w][threadIdx.x & (kWarp - 1)] = sum;
  __syncthreads();
  if (w > 0 || i >= plan.parameters) return;
  for (int n = 1; n < kWarps; ++n) sum += part[n][threadIdx.x];
  int l = 0;
  while (l + 1 < mlp.layers && i >= plan.parameter[l + 1]) ++l;
  const int64_t of_weight = int64_t{mlp.width[l]} * mlp.width[l + 1], at = i - plan.parameter[l];
  if (at < of_weight) {
    if (mlp.weight_bar[l] != nullptr) {
      StoreTo(sum, Advance(mlp.weight_bar[l], set * of_weight, mlp.stored), static_cast<int>(at), mlp.stored);
    }
  } else if (mlp.bias_bar[l] != nullptr) {
    StoreTo(sum, Advance(mlp.bias_bar[l], set * mlp.width[l + 1], mlp.stored), static_cast<int>(at - of_weight),
            mlp.stored);
  }
}

// ---- Launches.

// Lays out shared memory.
template <class P, bool kDual, bool kBackward, class T = typename P::Number>
void LayOut(const Mlp<T, T>& mlp, Plan& plan) {
  using E = typename P::Element;
  const int L = mlp.layers, span = plan.rows * (kDual ? 2 : 1);
  const auto padded = [&](int l) { return static_cast<int>(CeilDiv(mlp.width[l], kPiece) * kPiece); };
  int64_t bytes = 0;
  const auto take = [&](int64_t size) {
    const int64_t at = bytes;
    bytes += CeilDiv(size, 128) * 128;
    return static_cast<int>(at);
  };
  const auto elements = [&](int64_t rows, int width) { return take(rows * StrideOf<E>(width) * sizeof(E)); };
  const auto numbers = [&](int64_t rows, int width) { return take(rows * StrideOf<T>(width) * sizeof(T)); };
  int widest = 0;
  for (int l = 0; l <= L; ++l) widest = std::max(widest, mlp.width[l]);
  int64_t most = 0;
  for (int l = 0; l < L; ++l) {
    const int64_t start = bytes;
    plan.weight[l] = elements(padded(l + 1), mlp.width[l]);
    if (mlp.weight[l].tangent.data != nullptr) plan.weight_tangent[l] = elements(padded(l + 1), mlp.width[l]);
    plan.bias[l] = take(padded(l + 1) * sizeof(T));
    if (kDual) plan.bias_tangent[l] = take(padded(l + 1) * sizeof(T));
    if (!plan.resident) {  // each in the same place
      most = Max(most, bytes - start);
      bytes = start;
    }
  }
  bytes += most;
  if (kBackward) {
    for (int& delta : plan.delta) delta = elements(span, widest);
  }
  if (kBackward && !plan.kept) {
    for (int l = 0; l < L; ++l) plan.h[l] = elements(span, mlp.width[l]);
    for (int l = 0; l + 1 < L; ++l) plan.slope[l] = numbers(span, mlp.width[l + 1]);
  } else {
    int widths[2] = {};
    for (int l = 0; l < L; ++l) widths[l & 1] = std::max(widths[l & 1], mlp.width[l]);
    const int at[2] = {elements(span, widths[0]), elements(span, widths[1])};
    for (int l = 0; l < L; ++l) plan.h[l] = at[l & 1];
    if (kBackward) {
      const int slope = numbers(span, widest);
      for (int l = 0; l + 1 < L; ++l) plan.slope[l] = slope;
    }
  }
  if (plan.sums_shared) {
    for (int l = plan.lowest; l < L; ++l) {
      plan.sum[l] = numbers(padded(l + 1), mlp.width[l]);
      plan.bias_sum[l] = take(padded(l + 1) * sizeof(T));
    }
  }
  plan.bytes = static_cast<int>(Min(bytes, int64_t{1} << 30));
}

// The first of layouts that fits.
template <class P, bool kDual, bool kBackward, class T = typename P::Number>
bool Fit(const Mlp<T, T>& mlp, bool sums, int shared, Plan& plan) {
  const auto fits = [&](int span, bool resident, bool sums_shared, bool kept) {
    plan.resident = resident, plan.sums_shared = sums && sums_shared, plan.kept = kept;
    plan.rows = kDual ? span / 2 : span;
    LayOut<P, kDual, kBackward>(mlp, plan);
    return plan.bytes <= shared;
  };
  for (int span : {kBackward ? 64 : 128, 64, 32}) {
    for (bool resident : {true, false}) {
      if (fits(span, resident, true, false) || fits(span, resident, false, false)) return true;
    }
  }
  if (!kBackward || MlpCudaKeptBytes(mlp.width, mlp.layers, sizeof(T)) == 0) return false;
  return fits(kMlpCudaKeptRows, false, false, true);
}

template <class P, bool kDual, bool kBackward, class T = typename P::Number>
cudaError_t Launch(const Mlp<T, T>& mlp, T* scratch, int64_t bytes, int multiprocessors, int shared,
                   cudaStream_t stream) {
  Plan plan = {};
  const bool sums = kBackward && WantsSums(mlp);
  Batch kept = mlp.sum_batch;
  if (!sums) {
    for (int a = 0; a < mlp.batch.ndim; ++a) kept.size[a] = 1;
    kept.ndim = mlp.batch.ndim;
  }
  plan.split = Split(mlp.batch, kept);
  const int64_t entries = Count(mlp.batch), sets = Count(kept);
  for (int l = 0; l < mlp.layers; ++l) {
    for (const Input<T>& input : {mlp.weight[l], mlp.bias[l]}) {
      for (int a = 0; a < mlp.batch.ndim; ++a) {
        plan.weights_vary |= input.value.data != nullptr && input.value.stride[a] != 0;
        plan.weights_vary |= input.tangent.data != nullptr && input.tangent.stride[a] != 0;
      }
    }
  }
  if (sums) {
    for (int l = 0; l < mlp.layers; ++l) {
      plan.parameter[l] = plan.parameters;
      plan.parameters += int64_t{mlp.width[l + 1]} * (mlp.width[l] + 1);
    }
  }
  if (kBackward && !WantsRows(mlp)) {
    while (plan.lowest + 1 < mlp.layers && mlp.weight_bar[plan.lowest] == nullptr &&
           mlp.bias_bar[plan.lowest] == nullptr) {
      ++plan.lowest;
    }
  }
  if (sets == 0 || ((entries == 0 || mlp.N == 0) && !sums)) return cudaSuccess;

  if (!Fit<P, kDual, kBackward>(mlp, sums, shared, plan)) return cudaErrorInvalidConfiguration;
  const auto kernel = RunTiles<P, kDual, kBackward>;
  if (cudaError_t error = AllowSharedMemory(kernel, plan.bytes); error != cudaSuccess) return error;
  int resident_blocks = 1;
  if (cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident_blocks, kernel, kThreads, plan.bytes);
      error != cudaSuccess) {
    return error;
  }
  plan.tiles_of_entry = CeilDiv(mlp.N, plan.rows);
  plan.tiles = entries / sets * plan.tiles_of_entry;
  const int64_t resident = int64_t{multiprocessors} * std::max(1, resident_blocks);
  int64_t most = CeilDiv(resident, sets);
  if (sums) most = Min(most, Max(1, kMlpCudaPieces / sets));
  if (plan.kept) most = Min(most, Max(1, kMlpCudaKeeping / sets));
  plan.pieces = static_cast<int>(Max(1, Min(plan.tiles, most)));
  const int64_t blocks = sets * plan.pieces;
  plan.keep = MlpCudaSumBytes(blocks, plan.parameters, sizeof(T));
  plan.keep_of_block = plan.kept ? MlpCudaKeptBytes(mlp.width, mlp.layers, sizeof(T)) : 0;
  if (plan.keep + blocks * plan.keep_of_block > bytes) return cudaErrorMemoryAllocation;
  if (cudaError_t error = CheckGrid(blocks); error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, plan.bytes, stream>>>(mlp, plan, scratch);
  if (sums) {
    const dim3 grid(static_cast<unsigned>(CeilDiv(plan.parameters, kWarp)), static_cast<unsigned>(sets));
    AddPieces<T><<<grid, kThreads, 0, stream>>>(mlp, plan, scratch);
  }
  return cudaGetLastError();
}

template <class P, class T = typename P::Number>
cudaError_t LaunchKind(const Mlp<T, T>& mlp, T* scratch, int64_t bytes, int multiprocessors, int shared,
                       cudaStream_t stream) {
  const bool dual = HasTangents(mlp), backward = WantsSums(mlp) || WantsRows(mlp);
  const auto launch = dual       ? backward ? Launch<P, true, true> : Launch<P, true, false>
                      : backward ? Launch<P, false, true>
                                 : Launch<P, false, false>;
  return launch(mlp, scratch, bytes, multiprocessors, shared, stream);
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

template <class T>
cudaError_t LaunchMlp(const Mlp<T, T>& args, void* scratch, int64_t bytes, cudaStream_t stream) {
  using namespace KNN_ISA;
  int device, major, multiprocessors, shared;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  auto launch = LaunchKind<Scalars<T>>;
  if constexpr (sizeof(T) == 4) {
    if (major >= 8) {
      launch = args.stored == Stored::bfloat16               ? LaunchKind<Halves<Stored::bfloat16>>
               : args.stored == Stored::half                 ? LaunchKind<Halves<Stored::half>>
               : args.precision == ProductPrecision::highest ? LaunchKind<Floats<true>>
                                                             : LaunchKind<Floats<false>>;
    }
  }
  return launch(args, static_cast<T*>(scratch), bytes, multiprocessors, shared, stream);
}

bool MlpCudaServes(const int64_t* width, int layers, int64_t bytes) {
  using namespace KNN_ISA;
  int shared = 227 << 10;
  if (cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) != cudaSuccess) cudaGetLastError();
  // Tangents of all and gradients in all take most.
  const auto fits = [&](auto kind) {
    using P = decltype(kind);
    using T = typename P::Number;
    Mlp<T, T> mlp = {};
    mlp.layers = layers;
    static const T there = 0;
    for (int l = 0; l < layers; ++l) mlp.weight[l].tangent.data = &there;
    for (int l = 0; l <= layers; ++l) mlp.width[l] = static_cast<int>(width[l]);
    Plan plan = {};
    return Fit<P, true, true>(mlp, true, shared, plan);
  };
  for (int l = 0; l <= layers; ++l) {
    if (width[l] > kMlpCudaMaxWidth) return false;
  }
  // Devices without matrix units keep floats of what has 16 bits.
  return bytes == 8 ? fits(Scalars<double>()) : bytes == 4 ? fits(Floats<true>()) : fits(Halves<Stored::half>());
}

template cudaError_t LaunchMlp<float>(const Mlp<float, float>&, void*, int64_t, cudaStream_t);
template cudaError_t LaunchMlp<double>(const Mlp<double, double>&, void*, int64_t, cudaStream_t);

}  // namespace knn
