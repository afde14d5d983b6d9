// Puts points into an order in which neighbours in space are neighbours in memory, for CPU kernels.

#ifndef JKA_KNN_CURVE_H_
#define JKA_KNN_CURVE_H_

#include <utility>

#include "common/numeric.h"

namespace knn::KNN_ISA {

// Where cells are on a Hilbert curve through 2^kBits cells a side; see J. Skilling, Programming the Hilbert curve
// (2004). Many at a time, for SIMD.
inline constexpr int kBits = 10, kCells = 64;
inline void HilbertCodes(uint32_t (&x)[kCells], uint32_t (&y)[kCells], uint32_t (&z)[kCells], uint32_t* codes) {
  // From the coarsest level on, each bit of a coordinate says how the curve lies inside: the finer bits of x are
  // inverted, or exchanged with those of the coordinate.
  uint32_t flip[kCells] = {};
  for (int level = kBits - 1; level > 0; --level) {
    const uint32_t finer = (1u << level) - 1;
    const auto finer_if = [=](uint32_t a) { return (0 - (a >> level & 1)) & finer; };
    for (int i = 0; i < kCells; ++i) {
      uint32_t a = x[i], b = y[i], c = z[i];
      a ^= finer_if(a);
      const uint32_t invert_b = finer_if(b), exchange_b = (a ^ b) & (finer ^ invert_b);
      a ^= invert_b | exchange_b;
      b ^= exchange_b;
      const uint32_t invert_c = finer_if(c), exchange_c = (a ^ c) & (finer ^ invert_c);
      a ^= invert_c | exchange_c;
      c ^= exchange_c;
      flip[i] ^= finer_if(a ^ b ^ c);
      x[i] = a, y[i] = b, z[i] = c;
    }
  }
  const auto spread = [](uint32_t a) {  // two zeros between bits
    a = (a | a << 16) & 0x030000ffu;
    a = (a | a << 8) & 0x0300f00fu;
    a = (a | a << 4) & 0x030c30c3u;
    return (a | a << 2) & 0x09249249u;
  };
  for (int i = 0; i < kCells; ++i) {
    const uint32_t a = x[i], b = a ^ y[i], c = b ^ z[i];
    codes[i] = spread(a ^ flip[i]) << 2 | spread(b ^ flip[i]) << 1 | spread(c ^ flip[i]);
  }
}

// Sorts the numbers of n points x [n, 3] along a curve through their bounding box. They are the low 32 bits of keys[0]
// to keys[n − 1]; the other half of `keys` [2n] is spare. Where points without a number go does not matter.
template <class T>
void SortAlongCurve(const T* x, int64_t n, uint64_t* keys) {
  constexpr T kMost = Precision<T>::kMost, kSide = 1 << kBits;
  T low[3] = {kMost, kMost, kMost}, high[3] = {-kMost, -kMost, -kMost}, extent = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int a = 0; a < 3; ++a) {
      const T at = x[3 * i + a];
      low[a] = at < low[a] && at >= -kMost ? at : low[a];
      high[a] = at > high[a] && at <= kMost ? at : high[a];
    }
  }
  for (int a = 0; a < 3; ++a) extent = high[a] - low[a] > extent ? high[a] - low[a] : extent;
  const T scale = kSide / extent;
  uint64_t *from = keys, *to = keys + n;
  for (int64_t i = 0; i < n; i += kCells) {
    uint32_t cells[3][kCells], codes[kCells];
    for (int64_t k = 0; k < kCells; ++k) {
      for (int a = 0; a < 3; ++a) {
        const T at = (x[3 * (i + k < n ? i + k : i) + a] - low[a]) * scale;
        cells[a][k] = static_cast<uint32_t>(static_cast<int32_t>(at > 0 ? (at < kSide ? at : kSide - 1) : 0));
      }
    }
    HilbertCodes(cells[0], cells[1], cells[2], codes);
    for (int64_t k = 0; k < kCells && i + k < n; ++k) to[i + k] = static_cast<uint64_t>(codes[k]) << 32 | (i + k);
  }
  // A radix sort, a coordinate's worth of bits at a time.
  const auto digit_of = [](uint64_t key, int digit) { return key >> (32 + kBits * digit) & ((1 << kBits) - 1); };
  int64_t begin[3][1 << kBits] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int digit = 0; digit < 3; ++digit) ++begin[digit][digit_of(to[i], digit)];
  }
  for (int digit = 0; digit < 3; ++digit) {
    int64_t sum = 0;
    for (int64_t& count : begin[digit]) sum += std::exchange(count, sum);
    std::swap(from, to);
    for (int64_t i = 0; i < n; ++i) to[begin[digit][digit_of(from[i], digit)]++] = from[i];
  }
}

}  // namespace knn::KNN_ISA

#endif  // JKA_KNN_CURVE_H_
