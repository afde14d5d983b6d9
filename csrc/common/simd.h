// A SIMD vector of scalars that the formulas of metric.h can be instantiated with, for CPU kernels.

#ifndef KNN_COMMON_SIMD_H_
#define KNN_COMMON_SIMD_H_

#include "common/metric.h"

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

// A struct, so that Fma below is found from inside metric.h by its argument.
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

// For each instruction set, for both types:
//   Fma  what Fma of numeric.h does, in each lane
//   Min  a < b ? a : b in each lane; so b where a is NaN
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

}  // namespace knn::KNN_ISA

#endif  // KNN_COMMON_SIMD_H_
