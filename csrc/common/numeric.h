// Scalars: rounding that does not depend on where a formula is inlined, and 16-bit storage types.
//
// Everything with code in it lives in namespace knn::KNN_ISA, one per instruction set that a file is compiled for, or
// is KNN_FN, always inlined: inline functions of one name compiled with different -m flags would break the
// one-definition rule, and the linker might keep the AVX-512 copy for every machine.

#ifndef JKA_COMMON_NUMERIC_H_
#define JKA_COMMON_NUMERIC_H_

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifndef KNN_ISA
#define KNN_ISA generic
#endif

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define KNN_FN __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Left to itself, GCC calls even a dot product where a function has many of them.
#define KNN_FN inline __attribute__((always_inline))
#else
#define KNN_FN inline
#endif

namespace knn {

// What std::numeric_limits says, for device code as well.
template <class T>
struct Precision;
template <>
struct Precision<float> {
  static constexpr float kEpsilon = FLT_EPSILON, kLeast = FLT_MIN, kMost = FLT_MAX;
};
template <>
struct Precision<double> {
  static constexpr double kEpsilon = DBL_EPSILON, kLeast = DBL_MIN, kMost = DBL_MAX;
};

// Storage of features; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// How features are stored: as what is computed in, or in 16 bits. Kernels that are told so at run time know either kind
// of 16 bits by one type, since a copy for each would be much to compile for little.
enum class Stored : int32_t { whole, bfloat16, half };
struct Float16 {
  uint16_t bits;
};
template <class S>
inline constexpr Stored kStored = Stored::whole;
template <>
inline constexpr Stored kStored<BFloat16> = Stored::bfloat16;
template <>
inline constexpr Stored kStored<Half> = Stored::half;

template <class S>
using AnyHalf = std::conditional_t<kStored<S> == Stored::whole, S, Float16>;

// The arguments of a kernel, which say in `stored` how features are stored, with another type for these.
template <class As, template <class, class> class Args, class T, class S>
Args<T, As> Retyped(const Args<T, S>& args) {
  static_assert(sizeof(Args<T, As>) == sizeof(Args<T, S>));
  Args<T, As> retyped;
  std::memcpy(static_cast<void*>(&retyped), &args, sizeof retyped);
  return retyped;
}

}  // namespace knn

namespace knn::KNN_ISA {

KNN_FN constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
KNN_FN constexpr int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
KNN_FN constexpr int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

// Whether i, any integer, is the number of one of n things: what every number that users give, or that lies in an array
// of theirs, is asked before it is part of an address. n <= 2³¹.
KNN_FN constexpr bool Names(int32_t i, int64_t n) { return static_cast<uint32_t>(i) < n; }

// a·b + c. Written out wherever a product is added, and files are compiled without contraction, so that a distance has
// the same bits in the search that ranks it and in the kernel that returns it.
template <class T>
KNN_FN T Fma(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  if constexpr (sizeof(T) == 4) {
    return __builtin_fmaf(a, b, c);
  } else {
    return __builtin_fma(a, b, c);
  }
#else
  return a * b + c;
#endif
}

// As Fma, rounded once on every machine, for a price where there is no instruction.
KNN_FN float FusedFma(float a, float b, float c) { return ::fmaf(a, b, c); }
KNN_FN double FusedFma(double a, double b, double c) { return ::fma(a, b, c); }

// The number 1 of the type that x is of.
KNN_FN float One(float /*x*/) { return 1; }
KNN_FN double One(double /*x*/) { return 1; }

KNN_FN float Floor(float x) { return ::floorf(x); }
KNN_FN double Floor(double x) { return ::floor(x); }
KNN_FN float Abs(float x) { return ::fabsf(x); }
KNN_FN double Abs(double x) { return ::fabs(x); }
KNN_FN float Exp(float x) { return ::expf(x); }
KNN_FN double Exp(double x) { return ::exp(x); }
KNN_FN float Sin(float x) { return ::sinf(x); }
KNN_FN double Sin(double x) { return ::sin(x); }
KNN_FN float Cos(float x) { return ::cosf(x); }
KNN_FN double Cos(double x) { return ::cos(x); }

KNN_FN float BitsToFloat(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

KNN_FN uint32_t FloatToBits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// Widening is exact; narrowing rounds to nearest, ties to even, and keeps NaN.
KNN_FN float Widen(float x) { return x; }
KNN_FN double Widen(double x) { return x; }
KNN_FN float Widen(BFloat16 x) { return BitsToFloat(static_cast<uint32_t>(x.bits) << 16); }
KNN_FN float Widen(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Shifting exponent and mantissa into place leaves the exponent 112 too small; infinity and NaN must have the largest
  // exponent instead. Subnormal halves are normal floats, and no subnormal float may arise on the way: XLA's threads
  // read those as 0.
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t subnormal = FloatToBits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return BitsToFloat(sign | (magnitude < 0x400u ? subnormal : normal));
#endif
}

KNN_FN void Narrow(float x, float* out) { *out = x; }
KNN_FN void Narrow(double x, double* out) { *out = x; }
KNN_FN void Narrow(float x, BFloat16* out) {
  const uint32_t bits = FloatToBits(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
KNN_FN void Narrow(float x, Half* out) {
#ifdef __CUDA_ARCH__
  out->bits = __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = FloatToBits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding ½ puts the last place of a half at the last place
    half = FloatToBits(BitsToFloat(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
#endif
}

// The same of what is stored as said.
template <class S>
KNN_FN auto Widen(S x, Stored /*stored*/) {
  return Widen(x);
}
KNN_FN float Widen(Float16 x, Stored stored) {
  return stored == Stored::bfloat16 ? Widen(BFloat16{x.bits}) : Widen(Half{x.bits});
}
template <class T, class S>
KNN_FN void Narrow(T x, Stored /*stored*/, S* out) {
  Narrow(x, out);
}
KNN_FN void Narrow(float x, Stored stored, Float16* out) {
  if (stored == Stored::bfloat16) {
    BFloat16 narrow;
    Narrow(x, &narrow);
    out->bits = narrow.bits;
  } else {
    Half narrow;
    Narrow(x, &narrow);
    out->bits = narrow.bits;
  }
}

}  // namespace knn::KNN_ISA

#endif  // JKA_COMMON_NUMERIC_H_
