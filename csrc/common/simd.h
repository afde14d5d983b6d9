// A SIMD vector of scalars that formulas can be instantiated with, for CPU kernels.

#ifndef JKA_COMMON_SIMD_H_
#define JKA_COMMON_SIMD_H_

#include <type_traits>

#include "common/numeric.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace knn::KNN_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

// A struct, so that Fma below is found from inside formulas by its argument.
template <class T>
struct Vec {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  typedef T Native __attribute__((vector_size(kVectorBytes)));
  Native v;

  static KNN_FN Vec Load(const T* a) {
    Vec x;
    std::memcpy(&x, a, sizeof x);
    return x;
  }
  static KNN_FN Vec Broadcast(T a) { return {a - Native{}}; }
  static KNN_FN Vec Ramp() {  // 0, 1, 2, …
    Vec x;
    for (int l = 0; l < kLanes; ++l) x.v[l] = static_cast<T>(l);
    return x;
  }
  KNN_FN void Store(T* a) const { std::memcpy(a, this, sizeof *this); }
};

template <class T>
KNN_FN Vec<T> operator+(Vec<T> a, Vec<T> b) {
  return {a.v + b.v};
}
template <class T>
KNN_FN Vec<T> operator-(Vec<T> a, Vec<T> b) {
  return {a.v - b.v};
}
template <class T>
KNN_FN Vec<T> operator*(Vec<T> a, Vec<T> b) {
  return {a.v * b.v};
}

// Lane l of the result is lane `lane`[l] of a and b in a row.
template <int... lane, class T>
KNN_FN Vec<T> Lanes(Vec<T> a, Vec<T> b) {
#if defined(__clang__) || __GNUC__ >= 12
  return {__builtin_shufflevector(a.v, b.v, lane...)};
#else
  typedef std::conditional_t<sizeof(T) == 8, int64_t, int32_t> Index __attribute__((vector_size(kVectorBytes)));
  return {__builtin_shuffle(a.v, b.v, Index{lane...})};
#endif
}

template <class T>
KNN_FN Vec<T> operator*(int a, Vec<T> b) {
  return {static_cast<T>(a) * b.v};
}
template <class T>
KNN_FN Vec<T> operator-(Vec<T> a) {
  return {-a.v};
}
template <class T>
KNN_FN Vec<T> One(Vec<T> /*x*/) {
  return Vec<T>::Broadcast(1);
}
template <class T>
KNN_FN Vec<T> operator/(Vec<T> a, Vec<T> b) {
  return {a.v / b.v};
}
template <class T>
KNN_FN Vec<T> Sqrt(Vec<T> a) {
  for (int l = 0; l < Vec<T>::kLanes; ++l) a.v[l] = std::sqrt(a.v[l]);
  return a;
}

template <class T>
KNN_FN Vec<T> Scale(double c, Vec<T> x) {
  return Vec<T>::Broadcast(static_cast<T>(c)) * x;
}

// For each instruction set, for both types:
//   Fma  what Fma of numeric.h does, in each lane
//   Min, Max  a < b ? a : b and a > b ? a : b in each lane; so b where a is NaN
//   LessEqualMask  bit l says whether lane l of a is ≤ that of b
//   Sum  of all lanes
#if defined(__AVX2__)
KNN_FN float SumOf(__m256 a) {
  const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 y = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
KNN_FN double SumOf(__m256d a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
#endif

#if defined(__AVX512F__)

// The masks avoid false warnings of GCC 12 about _mm512_min_ps and the like.
KNN_FN Vec<float> Fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
KNN_FN Vec<double> Fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
KNN_FN Vec<float> Min(Vec<float> a, Vec<float> b) { return {_mm512_maskz_min_ps(-1, a.v, b.v)}; }
KNN_FN Vec<double> Min(Vec<double> a, Vec<double> b) { return {_mm512_maskz_min_pd(-1, a.v, b.v)}; }
KNN_FN Vec<float> Max(Vec<float> a, Vec<float> b) { return {_mm512_maskz_max_ps(-1, a.v, b.v)}; }
KNN_FN Vec<double> Max(Vec<double> a, Vec<double> b) { return {_mm512_maskz_max_pd(-1, a.v, b.v)}; }
KNN_FN uint32_t LessEqualMask(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
KNN_FN uint32_t LessEqualMask(Vec<double> a, Vec<double> b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ); }
KNN_FN float Sum(Vec<float> a) {
  __m256 half[2];
  std::memcpy(half, &a, sizeof half);
  return SumOf(_mm256_add_ps(half[0], half[1]));
}
KNN_FN double Sum(Vec<double> a) {
  __m256d half[2];
  std::memcpy(half, &a, sizeof half);
  return SumOf(_mm256_add_pd(half[0], half[1]));
}

#elif defined(__AVX2__)

KNN_FN Vec<float> Fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
KNN_FN Vec<double> Fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
KNN_FN Vec<float> Min(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.v, b.v)}; }
KNN_FN Vec<double> Min(Vec<double> a, Vec<double> b) { return {_mm256_min_pd(a.v, b.v)}; }
KNN_FN Vec<float> Max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
KNN_FN Vec<double> Max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
KNN_FN uint32_t LessEqualMask(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ));
}
KNN_FN uint32_t LessEqualMask(Vec<double> a, Vec<double> b) {
  return _mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ));
}
KNN_FN float Sum(Vec<float> a) { return SumOf(a.v); }
KNN_FN double Sum(Vec<double> a) { return SumOf(a.v); }

#elif defined(__SSE2__) && !defined(__FMA__)

template <class T>
KNN_FN Vec<T> Fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.v * b.v + c.v};
}
KNN_FN Vec<float> Min(Vec<float> a, Vec<float> b) { return {_mm_min_ps(a.v, b.v)}; }
KNN_FN Vec<double> Min(Vec<double> a, Vec<double> b) { return {_mm_min_pd(a.v, b.v)}; }
KNN_FN Vec<float> Max(Vec<float> a, Vec<float> b) { return {_mm_max_ps(a.v, b.v)}; }
KNN_FN Vec<double> Max(Vec<double> a, Vec<double> b) { return {_mm_max_pd(a.v, b.v)}; }
KNN_FN uint32_t LessEqualMask(Vec<float> a, Vec<float> b) { return _mm_movemask_ps(_mm_cmple_ps(a.v, b.v)); }
KNN_FN uint32_t LessEqualMask(Vec<double> a, Vec<double> b) { return _mm_movemask_pd(_mm_cmple_pd(a.v, b.v)); }

#else

#if defined(__aarch64__)
KNN_FN Vec<float> Fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
KNN_FN Vec<double> Fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
#else
template <class T>
KNN_FN Vec<T> Fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  for (int l = 0; l < Vec<T>::kLanes; ++l) c.v[l] = Fma(a.v[l], b.v[l], c.v[l]);
  return c;
}
#endif
template <class T>
KNN_FN Vec<T> Min(Vec<T> a, Vec<T> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <class T>
KNN_FN Vec<T> Max(Vec<T> a, Vec<T> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <class T>
KNN_FN uint32_t LessEqualMask(Vec<T> a, Vec<T> b) {
  const auto less_equal = a.v <= b.v;  // lanes of −1 and 0
  if constexpr (sizeof(T) == 8) {
    return static_cast<uint32_t>((less_equal[0] & 1) | (less_equal[1] & 2));
  } else {
    return static_cast<uint32_t>((less_equal[0] & 1) | (less_equal[1] & 2) | (less_equal[2] & 4) | (less_equal[3] & 8));
  }
}

#endif

#if !defined(__AVX2__)
template <class T>
KNN_FN T Sum(Vec<T> a) {
  if constexpr (sizeof(T) == 8) {
    return a.v[0] + a.v[1];
  } else {
    return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
  }
}
#endif

// Lanes of a where `which`, what a comparison of vectors gives, is true, else of b.
template <class T, class Which>
KNN_FN Vec<T> Select(Which which, Vec<T> a, Vec<T> b) {
  return {which ? a.v : b.v};
}

// 0 where a is less than `least`.
template <class T>
KNN_FN Vec<T> Flushed(Vec<T> a, Vec<T> least) {
  return Select(a.v < least.v, Vec<T>{}, a);
}

// e^x to about one unit in the last place: with n the integer nearest to x / ln 2 and r = x − n ln 2, the product of 2ⁿ
// and of e^r by Taylor's series.
template <class T>
KNN_FN Vec<T> Exp(Vec<T> x) {
  using V = Vec<T>;
  using Bits = decltype(x.v < x.v);
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr int kMantissa = kFloat ? 23 : 52, kBias = kFloat ? 127 : 1023, kDegree = kFloat ? 7 : 13;
  constexpr double kLeast = kFloat ? -104 : -746, kMost = kFloat ? 89 : 710;  // 0 and infinity from here on
  // ln 2 in two parts; products of n and the first are exact.
  constexpr double kHigh = kFloat ? 0x1.62ep-1 : 0x1.62e42feep-1;
  constexpr double kLow = kFloat ? 0x1.0bfbe8p-15 : 0x1.a39ef35793c76p-33;
  const auto constant = [](double c) { return V::Broadcast(static_cast<T>(c)); };
  const V within = Max(Min(x, constant(kMost)), constant(kLeast));
  // Adding this number leaves the nearest integer in the last bits.
  const V magic = constant(kFloat ? 0x1.8p23 : 0x1.8p52);
  const V shifted = Fma(within, constant(1.4426950408889634), magic), n = shifted - magic;
  const V r = Fma(-n, constant(kLow), Fma(-n, constant(kHigh), within));
  double factorial = 1;
  V sum = V::Broadcast(1), power_sum = V::Broadcast(0);
  for (int i = 2; i <= kDegree; ++i) factorial *= i;
  for (int i = kDegree; i >= 1; --i) {
    power_sum = Fma(power_sum, r, constant(1 / factorial));
    factorial /= i;
  }
  sum = Fma(power_sum, r, sum);
  // 2ⁿ in two factors, as it may be out of range where the result is not.
  const Bits exponent = (Bits)shifted.v - (Bits)magic.v, half = exponent >> 1;
  const auto power = [](Bits e) { return V{(typename V::Native)((e + kBias) << kMantissa)}; };
  return Select(x.v != x.v, x, sum * power(half) * power(exponent - half));
}

// Appends the lanes of x in `mask`, and their numbers counted from `first`, to xs and numbers; returns how many. May
// write a whole vector whatever the mask.
template <class T>
KNN_FN int Append(uint32_t mask, Vec<T> x, int32_t first, T* xs, int32_t* numbers) {
#if defined(__AVX512VL__)
  // Compressing into a register and storing all of it: compressing into memory is slow on some machines.
  if constexpr (sizeof(T) == 4) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_ps(xs, _mm512_maskz_compress_ps(mask, x.v));
    _mm512_storeu_si512(numbers, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
  } else {
    const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_storeu_pd(xs, _mm512_maskz_compress_pd(mask, x.v));
    _mm256_storeu_epi32(numbers, _mm256_maskz_compress_epi32(mask, _mm256_add_epi32(lanes, _mm256_set1_epi32(first))));
  }
  return __builtin_popcount(mask);
#else
  int n = 0;
  for (int l = 0; l < Vec<T>::kLanes; ++l) {  // without a branch that would be mispredicted
    xs[n] = x.v[l];
    numbers[n] = first + l;
    n += mask >> l & 1;
  }
  return n;
#endif
}

}  // namespace knn::KNN_ISA

#endif  // JKA_COMMON_SIMD_H_
