// Exact search of all pairs, in float32, by tensor cores that rule points out.
//
// With d = q − p, the distance dᵀMd is a polynomial in q: ten coefficients of the point times ten monomials of the
// query. All distances together are then a matrix product of inner dimension 10, at which tensor cores are far faster
// than the other units are at dᵀMd. Its result is not a distance: multiplying out cancels digits. But the error has a
// bound that is known beforehand, and with that a block rules out nearly all points for its queries, in two passes over
// the cloud:
//
//   1. Upper bounds of the distances. Each lane keeps the least of those it meets, of G = 64 disjoint groups of points
//      for each query, or 128 for K > 32. K groups have a point no further than the K-th smallest of these minima, so
//      the K nearest are that near.
//   2. Lower bounds of the distances. Points whose lower bound is within that radius are candidates: of thousands,
//      hardly more than K. (About G ln(G / (G − K)) points meet K groups: 44 for K = 32, 89 for K = 64.)
//
// Candidates' distances are then computed as everywhere, and sorted. Where the bounds fail to separate (too many
// candidates: huge cancellation, many ties) or do not apply (numbers out of range; a candidate that lowered the radius
// but has no distance), a warp compares the query with all points.
//
// Numbers. Positions are taken relative to the centre of the cloud's box and scaled by a power of two so that |p| <= 1;
// coefficients are scaled by a power of two so that the largest are near 2⁷. A number x is split into two halves,
// x ≈ x_h + x_l, each with 11 bits, and xy ≈ x_h y_h + x_h y_l + x_l y_h. With 9 monomials beside the constant, which
// needs no splitting on the query's side, and a place each for the error bound and the radius, 32 places of the inner
// dimension do: two instructions for 16 queries and 8 points. With the radius in the product, pass 2 reads signs.
//
// The bound. All terms of the polynomial together are at most S = m (1 + r)², with r = max_a |q_a| and m the metric's
// Magnitude. With ε = 2⁻²⁴, relative to S: the query's position is rounded by ε, 2ε; its monomials are, ε; splitting,
// twice, and leaving out x_l y_l, 13ε; at most 34 additions, each truncated to 24 bits, which loses up to 2ε, 68ε; the
// distance as computed in float32 differs from the exact one by at most 11ε. That is 95ε; 128ε is taken. Halves below
// 2⁻¹⁴ are subnormal, spaced by 2⁻²⁴: 10 coefficients of the scaled polynomial, and low halves of monomials times
// coefficients of at most 2⁷, err by another 2⁻²⁵ each. The latter is 1.5ε of S in all; for the former, 2⁻²¹ (1 + r)²
// is taken. So with
//
//   e = 2⁻¹⁷ m + 2⁻²¹ (m scaled),   |polynomial − distance| <= e (1 + r)²,
//
// a product like the others: adding it gives upper bounds, subtracting it lower ones. That a distance as computed does
// not underflow on the way, nor overflow, is left out: clouds where it might (kMaxUnit) are out of range. Points whose
// magnitude is beyond floats, or that have no polynomial but may be at −inf, have e = +inf: they do not count in pass
// 1, and always are candidates in pass 2.

#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>

#include "knn/search/cuda.h"
#include "knn/search/nearest.cuh"

namespace knn::KNN_ISA {
namespace {

constexpr int kWarps = 8;
constexpr int kColumns = 8;                 // points of a tile
constexpr int kPlaces = 32;                 // of the inner dimension
constexpr int kGroups = kWarps * kColumns;  // of points, in a set of them, for each query
constexpr int kMonomials = 9;
constexpr int kConstant = 3 * kMonomials, kError = kConstant + 3, kRadius = kError + 1;  // places
static_assert(kRadius == kPlaces - 1);
constexpr float kMaxPosition = 128;  // squares must fit a half
constexpr int kMaxUnit = 96;         // of |log_unit|

// One side of the product for one query or point. Places 8t to 8t + 7 are what lane t of four holds of it.
struct alignas(16) Halves {
  __half place[kPlaces];
};

// A point as the exact distance needs it, in 16 bytes or 64.
template <class M>
struct alignas(16) Record {
  Vec3<float> p;
  typename M::Parameters m;
  float unused[16 - 3 - sizeof(typename M::Parameters) / 4];
};
template <>
struct alignas(16) Record<Isotropic<float>> {
  Vec3<float> p;
  Isotropic<float>::Parameters m;
};

// What Extent says of how to scale.
struct Frame {
  Vec3<float> centre;
  int log_size;  // |p − centre| <= 2^log_size
  int log_unit;  // magnitudes times 4^log_size are at most 2^(7 + log_unit), and one is at least half of that

  Frame() = default;
  __device__ explicit Frame(const Extent& extent) {
    const Vec3<float> low = extent.Low(), high = extent.High();
    centre = {low.x / 2 + high.x / 2, low.y / 2 + high.y / 2, low.z / 2 + high.z / 2};
    const auto half = [](float low, float centre, float high) {
      return fmax(double(high) - centre, double(centre) - low);
    };
    const double size =
        fmax(fmax(half(low.x, centre.x, high.x), half(low.y, centre.y, high.y)), half(low.z, centre.z, high.z));
    log_size = size > 0 ? ilogb(size) + 1 : 0;
    const float magnitude = extent.Magnitude();
    log_unit = magnitude > 0 ? ilogbf(magnitude) + 1 + 2 * log_size - 7 : 0;
  }
};

constexpr int kPrepareThreads = 64;  // of a block; many small ones keep more multiprocessors busy

struct Scratch {
  Extent* extents;  // [clouds, kParts], each of a part of the cloud
  Frame* frames;    // [clouds]
  Halves* halves;   // [clouds, tiles · kColumns]
  char* records;    // [clouds, P] of Record<M>
};

int64_t Tiles(int64_t P) { return CeilDiv(P, kColumns); }

// Divides memory, and returns how many bytes that takes.
int64_t Divide(void* memory, int64_t clouds, int64_t P, Scratch& scratch) {
  char* at = static_cast<char*>(memory);
  const auto take = [&at](auto*& part, int64_t n) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(at);
    at += n * int64_t{sizeof *part};
  };
  take(scratch.halves, clouds * Tiles(P) * kColumns);
  take(scratch.records, clouds * P * int64_t{sizeof(Record<Anisotropic<float>>)});
  take(scratch.extents, clouds * kParts);
  take(scratch.frames, clouds);
  return at - static_cast<char*>(memory);
}

__device__ __forceinline__ __half High(double x) { return __float2half_rn(static_cast<float>(x)); }
__device__ __forceinline__ __half Low(double x) {
  return __float2half_rn(static_cast<float>(x - static_cast<double>(__half2float(High(x)))));
}

template <class M>
__global__ void __launch_bounds__(kPrepareThreads)
    Prepare(const Search<float> args, const Batch clouds, unsigned blocks_per_cloud, Scratch scratch) {
  __shared__ Frame frame;
  const unsigned c = blockIdx.x / blocks_per_cloud;
  const int64_t j = int64_t{blockIdx.x % blocks_per_cloud} * kPrepareThreads + threadIdx.x;
  if (threadIdx.x < kWarp) {
    const Extent extent = Together(scratch.extents + int64_t{c} * kParts);
    if (threadIdx.x == 0) {
      frame = Frame(extent);
      if (j == 0) scratch.frames[c] = frame;
    }
  }
  __syncthreads();
  const int64_t columns = CeilDiv(args.P, kColumns) * kColumns;
  if (j >= columns) return;
  const Cloud<M, float> cloud(args, clouds, c);
  Halves out = {};
  Record<M> record = {};
  bool bounded = false, unbounded = false;
  if (j < cloud.length) {
    record.p = cloud.Point(j);
    record.m = cloud.Parameters(j);
    const bool finite = IsFinite<M>(record.p, record.m);
    bounded = finite && M::Magnitude(record.m) <= double(FLT_MAX);
    unbounded = !bounded && (finite || HasNegative<M>(record.m));
  }
  if (bounded) {
    const double size = ldexp(1.0, -frame.log_size), unit = ldexp(1.0, -frame.log_unit);
    const double x = (double(record.p.x) - frame.centre.x) * size, y = (double(record.p.y) - frame.centre.y) * size,
                 z = (double(record.p.z) - frame.centre.z) * size;
    const double scale = ldexp(unit, 2 * frame.log_size);
    const Form form = M::QuadraticForm(record.m);
    const double xx = form.xx * scale, yy = form.yy * scale, zz = form.zz * scale, xy = form.xy * scale,
                 xz = form.xz * scale, yz = form.yz * scale;
    const double mx = xx * x + xy * y + xz * z, my = xy * x + yy * y + yz * z, mz = xz * x + yz * y + zz * z;
    const double of[kMonomials] = {-2 * mx, -2 * my, -2 * mz, xx, yy, zz, 2 * xy, 2 * xz, 2 * yz};
#pragma unroll
    for (int i = 0; i < kMonomials; ++i) {
      out.place[3 * i] = out.place[3 * i + 2] = High(of[i]);
      out.place[3 * i + 1] = Low(of[i]);
    }
    const double constant = x * mx + y * my + z * mz;
    out.place[kConstant] = High(constant);
    out.place[kConstant + 1] = Low(constant);
    out.place[kError] =
        __float2half_ru(__double2float_ru(kFilterError * scale * MagnitudeOf<M>(record.m) + kFilterUnderflow));
  } else if (unbounded) {
    out.place[kError] = __ushort_as_half(0x7c00);  // always a candidate
  } else {
    out.place[kConstant] = __ushort_as_half(0x7c00);  // further than all that exist
  }
  out.place[kRadius] = __ushort_as_half(0x3c00);
  scratch.halves[c * columns + j] = out;
  if (j < args.P) reinterpret_cast<Record<M>*>(scratch.records)[c * args.P + j] = record;
}

// acc += the product of 16 queries' and 8 points' halves, over 16 places.
__device__ __forceinline__ void MultiplyAdd(float (&acc)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                            unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a2), "r"(a3), "r"(b1));
#endif
}

// The K-th smallest of 8n numbers, of which each of four consecutive lanes holds 2n: bisection over all halves.
template <int n>
__device__ __forceinline__ __half KthSmallest(const __half2 (&mine)[n], int K) {
  const auto from_key = [](unsigned key) {  // halves in ascending order
    return __ushort_as_half(static_cast<unsigned short>(key ^ ((key & 0x8000u) != 0 ? 0x8000u : 0xffffu)));
  };
  unsigned low = 0, high = 0xfc00u;        // that of +inf
  for (int step = 0; step < 16; ++step) {  // as often in all lanes
    const unsigned middle = (low + high) / 2;
    const __half2 at = __half2half2(from_key(middle));
    __half2 counts = __hle2(mine[0], at);
#pragma unroll
    for (int i = 1; i < n; ++i) counts = __hadd2(counts, __hle2(mine[i], at));
    float count = __low2float(counts) + __high2float(counts);
    count += __shfl_xor_sync(kFullMask, count, 1);
    count += __shfl_xor_sync(kFullMask, count, 2);
    const bool enough = count >= static_cast<float>(K);
    high = enough ? middle : high;
    low = enough ? low : middle + 1;
  }
  return from_key(high);
}

// The query's side of the product.
__device__ __forceinline__ Halves MonomialsOf(Vec3<float> q, float reach) {
  Halves out = {};
  const float of[kMonomials] = {q.x, q.y, q.z, q.x * q.x, q.y * q.y, q.z * q.z, q.x * q.y, q.x * q.z, q.y * q.z};
#pragma unroll
  for (int i = 0; i < kMonomials; ++i) {
    out.place[3 * i] = out.place[3 * i + 1] = High(of[i]);
    out.place[3 * i + 2] = Low(of[i]);
  }
  out.place[kConstant] = out.place[kConstant + 1] = __ushort_as_half(0x3c00);
  out.place[kError] = __float2half_ru((1 + reach) * (1 + reach));
  return out;
}

constexpr int kAhead = 4;                   // tiles on their way to a warp
using Ring = uint4[kWarps][kAhead][kWarp];  // through which they come

// The stages of a block, which owns kQueries queries. Its warps share out the points: warp w has tiles w, w + kWarps,
// ... K is at most kSets * kWarp, half as many as there are groups. With two sets of them, and twice as many
// candidates, there is room for half as many queries, in shared memory and in registers.
template <class M, int kSets>
struct Stages {
  static constexpr int kRowTiles = 6 / kSets;  // of 16 queries
  static constexpr int kQueries = 16 * kRowTiles;
  static constexpr int kMaxCandidates = 80 * kSets;               // so that shared memory suffices on Ampere and Ada
  static constexpr int kRecord = sizeof(Record<M>) / 16;          // of 16 bytes
  static constexpr int kStride = kRecord == 1 ? 1 : kRecord + 1;  // so that lanes reading records hit different banks

  // Shared memory: of each stage, and what a later one reads.
  struct Monomials {
    Halves of[kQueries];
  };
  struct Minima {
    Ring ring;
    __half of[kSets][kQueries][kGroups + 8];
  };
  struct Hits {
    Ring ring;
    uint32_t of[kQueries][kGroups + 4][2];  // a bit for each of a warp's next 64 tiles
  };
  struct Ranking {
    float4 dists[kWarps][(kMaxCandidates + kWarp - 1) / kWarp * kWarp / 4];
    uint4 records[kWarps][2][kWarp * kStride];
  };
  struct Found {
    int candidates[kQueries][kMaxCandidates];
    int num_candidates[kQueries];
    __half radius[kQueries];  // negative
  };
  struct Shared {
    union {
      Monomials monomials;
      Minima minima;
      Hits hits;
      Ranking ranking;
    };
    Found found;
  };

  // A lane's part of the product's sides. Lane 4 g + t has rows g and g + 8 of each tile of queries, and places 8t to
  // 8t + 7.
  struct Rows {
    uint4 low[kRowTiles], high[kRowTiles];
  };
  struct Points {
    const uint4* halves;  // of tile 0, this lane's
    int tiles;

    // How many tiles a warp has from its tile `start` on.
    __device__ __forceinline__ int Steps(int start) const { return max(0, (tiles - start + kWarps - 1) / kWarps); }
  };

  static __device__ __forceinline__ int Lane() { return threadIdx.x % kWarp; }
  static __device__ __forceinline__ int Warp() { return threadIdx.x / kWarp; }

  // Queries out of range count as having too many candidates.
  static __device__ __forceinline__ void WriteMonomials(const float* q, int num_queries, const Frame* of_cloud,
                                                        Monomials& monomials, Found& found) {
    if (threadIdx.x >= kQueries) return;
    const Frame frame = *of_cloud;
    const Vec3<float> moved = Load3(q + 3 * min(static_cast<int>(threadIdx.x), num_queries - 1)) - frame.centre;
    const Vec3<float> at = {ldexpf(moved.x, -frame.log_size), ldexpf(moved.y, -frame.log_size),
                            ldexpf(moved.z, -frame.log_size)};
    const float reach = fmaxf(fmaxf(fabsf(at.x), fabsf(at.y)), fabsf(at.z));
    const bool in_range = fabsf(at.x) <= kMaxPosition && fabsf(at.y) <= kMaxPosition && fabsf(at.z) <= kMaxPosition &&
                          abs(frame.log_unit) <= kMaxUnit;
    monomials.of[threadIdx.x] = in_range ? MonomialsOf(at, reach) : Halves{};
    found.num_candidates[threadIdx.x] = in_range ? 0 : kMaxCandidates + 1;
  }

  static __device__ __forceinline__ Rows ReadRows(const Monomials& monomials) {
    const int g = Lane() / 4, t = Lane() % 4;
    Rows rows;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      rows.low[m] = reinterpret_cast<const uint4*>(&monomials.of[16 * m + g])[t];
      rows.high[m] = reinterpret_cast<const uint4*>(&monomials.of[16 * m + g + 8])[t];
    }
    return rows;
  }

  // Calls visit(m, product) for `steps` of the warp's tiles from tile `start` on, and all tiles m of queries. Tiles
  // arrive in shared memory some steps ahead; every lane reads what it copied itself.
  template <class Visit>
  static __device__ __forceinline__ void ForTiles(const Rows& rows, const Points& points, int start, int steps,
                                                  Ring& ring, Visit visit) {
    const uint4* from = points.halves + int64_t{start} * kWarp;
    const auto fetch = [&](int step) {
      if (step < steps) {
        __pipeline_memcpy_async(&ring[Warp()][step % kAhead][Lane()], from + int64_t{step} * (kWarps * kWarp), 16);
      }
      __pipeline_commit();
    };
#pragma unroll
    for (int step = 0; step < kAhead - 1; ++step) fetch(step);
#pragma unroll kAhead
    for (int step = 0; step < steps; ++step) {
      fetch(step + kAhead - 1);
      __pipeline_wait_prior(kAhead - 1);
      const uint4 point = ring[Warp()][step % kAhead][Lane()];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        const uint4 low = rows.low[m], high = rows.high[m];
        float product[4] = {0, 0, 0, 0};
        MultiplyAdd(product, low.x, high.x, low.y, high.y, point.x, point.y);
        MultiplyAdd(product, low.z, high.z, low.w, high.w, point.z, point.w);
        visit(m, product);
      }
    }
  }

  // Pass 1. Of each row the lane has products with points 2t and 2t + 1 of a tile. Sets take turns from tile to tile:
  // they move up, so that the one whose turn it is stands in known registers. Unrolling leaves no moves.
  static __device__ __forceinline__ void FindMinima(const Rows& rows, const Points& points, Minima& minima) {
    static_assert(kAhead % kSets == 0);
    const int g = Lane() / 4, t = Lane() % 4;
    float least[kSets][kRowTiles][4];
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) least[s][m][0] = least[s][m][1] = least[s][m][2] = least[s][m][3] = INFINITY;
    }
    ForTiles(rows, points, Warp(), points.Steps(Warp()), minima.ring, [&](int m, const float (&product)[4]) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float lesser = fminf(least[0][m][e], product[e]);
#pragma unroll
        for (int s = 1; s < kSets; ++s) least[s - 1][m][e] = least[s][m][e];
        least[kSets - 1][m][e] = lesser;
      }
    });
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          minima.of[s][16 * m + g + 8 * (e / 2)][8 * Warp() + 2 * t + e % 2] = __float2half_ru(least[s][m][e]);
        }
      }
    }
  }

  static __device__ __forceinline__ void FindRadii(int K, const Minima& minima, Found& found) {
    static_assert(kQueries % 8 == 0 && kGroups == 64);
    const int t = Lane() % 4;
    for (int row = threadIdx.x / 4; row < kQueries; row += kWarps * kWarp / 4) {
      __half2 mine[8 * kSets];
#pragma unroll
      for (int s = 0; s < kSets; ++s) std::memcpy(mine + 8 * s, &minima.of[s][row][16 * t], 8 * sizeof *mine);
      const float kth = __half2float(KthSmallest(mine, K));
      // A little more, against its own rounding in the product. Queries out of range are to have no candidates.
      const float more = found.num_candidates[row] == 0 ? kth + fabsf(kth) * 0x1p-12f : 0.0f;
      if (t == 0) found.radius[row] = __hneg(__float2half_ru(more));
    }
  }

  // For pass 2: adding errors becomes subtracting them, and the radius is subtracted as well.
  static __device__ __forceinline__ void SubtractRadii(const Found& found, Rows& rows) {
    const int g = Lane() / 4, t = Lane() % 4;
    if (t != kError / 8) return;
    const auto second_pass = [&](unsigned errors, int row) {
      return ((errors & 0xffffu) ^ 0x8000u) | unsigned{__half_as_ushort(found.radius[row])} << 16;
    };
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      rows.low[m].w = second_pass(rows.low[m].w, 16 * m + g);
      rows.high[m].w = second_pass(rows.high[m].w, 16 * m + g + 8);
    }
  }

  // Pass 2, of 64 tiles of each warp from tile `chunk` on.
  static __device__ __forceinline__ void FindHits(const Rows& rows, const Points& points, int chunk, Hits& hits) {
    const int g = Lane() / 4, t = Lane() % 4;
#pragma unroll 1
    for (int word = 0; word < 2; ++word) {
      const int start = chunk + word * 32 * kWarps + Warp(), steps = min(32, points.Steps(start));
      uint32_t signs[kRowTiles][4] = {};
      ForTiles(rows, points, start, steps, hits.ring, [&](int m, const float (&product)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) signs[m][e] = __funnelshift_l(__float_as_uint(product[e]), signs[m][e], 1);
      });
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // the first step in the highest bit
          hits.of[16 * m + g + 8 * (e / 2)][8 * Warp() + 2 * t + e % 2][1 - word] =
              steps == 0 ? 0 : signs[m][e] << (32 - steps);
        }
      }
    }
  }

  // Bits become numbers of points.
  static __device__ __forceinline__ void ListCandidates(const Hits& hits, int chunk, Found& found) {
    const int lane = Lane();
    for (int row = Warp(); row < kQueries; row += kWarps) {
      uint64_t sets[2];
      std::memcpy(sets, __builtin_assume_aligned(hits.of[row][2 * lane], 16), sizeof sets);
      const int mine = __popcll(sets[0]) + __popcll(sets[1]);
      int before = mine;
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(kFullMask, before, step);
        before += lane >= step ? other : 0;
      }
      const int count = found.num_candidates[row], total = __shfl_sync(kFullMask, before, kWarp - 1);
      const int from = count + before - mine;
      for (int i = 0; i < mine && from + i < kMaxCandidates; ++i) {
        const bool first = sets[0] != 0;
        const int group = 2 * lane + (first ? 0 : 1), step = __clzll(first ? sets[0] : sets[1]);
        sets[0] &= ~(uint64_t{first} << 63 >> step);
        sets[1] &= ~(uint64_t{!first} << 63 >> step);
        found.candidates[row][from + i] = (chunk + group / 8 + step * kWarps) * kColumns + group % 8;
      }
      __syncwarp();  // all lanes have read the count
      if (lane == 0) found.num_candidates[row] = min(count + total, kMaxCandidates + 1);
    }
  }

  // Writes a query's K nearest candidates, as far as there are as many, if `existing` of all `count` have a distance.
  static __device__ __forceinline__ void WriteNearest(const float4* fours, const int* candidates, int count,
                                                      int existing, int K, int32_t* out) {
    const float* dists = reinterpret_cast<const float*>(fours);
    // Equal distances show in the sum of ranks, which is then too small. They are rare.
    int sum = 0;
    for (int i = Lane(); i < count; i += kWarp) {
      const float dist = dists[i];
      if (!(dist < INFINITY)) continue;
      float before = 0;
      for (int four = 0; four < count; four += 4) {  // what is behind the last is +inf
        const float4 other = fours[four / 4];
        before += (other.x < dist ? 1.0f : 0.0f) + (other.y < dist ? 1.0f : 0.0f) + (other.z < dist ? 1.0f : 0.0f) +
                  (other.w < dist ? 1.0f : 0.0f);
      }
      const int rank = static_cast<int>(before);
      sum += rank;
      if (rank < K) out[rank] = candidates[i];
    }
    const bool ties = WarpSum(sum) != existing * (existing - 1) / 2;
    if (ties) __syncwarp();  // other lanes may write the same places again
    for (int i = Lane(); ties && i < count; i += kWarp) {
      const Neighbour<float> mine(dists[i], candidates[i]);
      int rank = 0;
      for (int other = 0; other < count; ++other) {
        rank += Neighbour<float>(dists[other], candidates[other]) < mine;
      }
      if (rank < K && mine.Exists()) out[rank] = mine.index();
    }
  }

  // The candidates' distances, and of each how many come before it.
  static __device__ __forceinline__ void RankCandidates(const Search<float>& args, unsigned b, int64_t first,
                                                        const float* q, int num_queries, const uint4* records,
                                                        const Found& found, Ranking& ranking) {
    const Cloud<M, float> cloud(args, args.batch, b);
    const int K = static_cast<int>(args.K);
    const int lane = Lane(), warp = Warp();
    float4* const fours = ranking.dists[warp];
    float* const dists = reinterpret_cast<float*>(fours);
    // kRecord lanes read a point's record together, and leave it to the lane whose candidate it is.
    // None are read where there are too many: queries out of range only count as if they had that many.
    const auto candidate = [&](int row, int i) {
      const int count = row < num_queries ? found.num_candidates[row] : 0;
      return i < count && count <= kMaxCandidates ? found.candidates[row][i] : INT_MAX;
    };
    const auto fetch = [&](int row, int start, int buffer) {
      const int j = candidate(row, start + lane);
#pragma unroll
      for (int part = 0; part < kRecord; ++part) {
        const int owner = part * (kWarp / kRecord) + lane / kRecord;
        const int from = __shfl_sync(kFullMask, j, owner);
        if (from < cloud.length) {
          __pipeline_memcpy_async(&ranking.records[warp][buffer][owner * kStride + lane % kRecord],
                                  records + int64_t{from} * kRecord + lane % kRecord, 16);
        }
      }
      __pipeline_commit();
    };
    fetch(warp, 0, 0);
    for (int row = warp, turn = 0; row < num_queries; row += kWarps, ++turn) {
      const Vec3<float> query = Load3(q + 3 * row);
      int32_t* out = args.idxs + (b * args.Q + first + row) * K;
      const int count = found.num_candidates[row], buffer = turn % 2;
      fetch(row + kWarps, 0, 1 - buffer);
      bool done = false;
      if (count <= kMaxCandidates) {
        int existing = 0;
        for (int start = 0; start < count; start += kWarp) {
          if (start > 0) {
            __syncwarp();
            fetch(row, start, buffer);
          }
          __pipeline_wait_prior(start > 0 ? 0 : 1);
          __syncwarp();
          const int j = candidate(row, start + lane);
          float dist = INFINITY;
          if (j < cloud.length) {
            const auto& record = reinterpret_cast<const Record<M>&>(ranking.records[warp][buffer][lane * kStride]);
            dist = M::Distance(record.m, query - record.p);
          }
          dists[start + lane] = dist;
          existing += __popc(__ballot_sync(kFullMask, dist < INFINITY));
        }
        __syncwarp();
        WriteNearest(fours, found.candidates[row], count, existing, K, out);
        done = existing >= K && existing == count;
      }
      if (!done) {
        __syncwarp();
        SearchAll<M, kSets>(query, cloud, K, out);
      }
    }
  }
};

template <class M, int kSets>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    FilterKernel(const Search<float> args, const Batch clouds, unsigned blocks_per_entry, const Scratch scratch) {
  using Stage = Stages<M, kSets>;
  extern __shared__ uint4 shared_memory[];
  auto& shared = *reinterpret_cast<typename Stage::Shared*>(shared_memory);
  auto& found = shared.found;
  const unsigned b = blockIdx.x / blocks_per_entry;
  const int64_t c = EntryOf(clouds, args.batch, b);
  const int64_t first = int64_t{blockIdx.x % blocks_per_entry} * Stage::kQueries;
  const int num_queries = static_cast<int>(min(int64_t{Stage::kQueries}, args.Q - first));
  const float* q = At(args.q, args.batch, b) + 3 * first;
  const int K = static_cast<int>(args.K), tiles = static_cast<int>(CeilDiv(args.P, kColumns));
  const typename Stage::Points points = {
      reinterpret_cast<const uint4*>(scratch.halves + c * tiles * kColumns) + Stage::Lane(), tiles};

  // Behind a barrier, a stage's memory is the next one's.
  Stage::WriteMonomials(q, num_queries, scratch.frames + c, shared.monomials, found);
  __syncthreads();
  typename Stage::Rows rows = Stage::ReadRows(shared.monomials);
  __syncthreads();
  Stage::FindMinima(rows, points, shared.minima);
  __syncthreads();
  Stage::FindRadii(K, shared.minima, found);
  __syncthreads();
  Stage::SubtractRadii(found, rows);
  for (int chunk = 0; chunk < tiles; chunk += 64 * kWarps) {
    Stage::FindHits(rows, points, chunk, shared.hits);
    __syncthreads();
    Stage::ListCandidates(shared.hits, chunk, found);
    __syncthreads();
  }
  const uint4* records = reinterpret_cast<const uint4*>(scratch.records) + c * args.P * Stage::kRecord;
  Stage::RankCandidates(args, b, first, q, num_queries, records, found, shared.ranking);
}

template <class M, int kSets>
cudaError_t Launch(const Search<float>& args, void* memory, int64_t bytes, cudaStream_t stream) {
  using Memory = typename Stages<M, kSets>::Shared;
  static_assert(sizeof(Memory) <= 99 * 1024, "what a block may have on Ampere and Ada");
  int device, shared_bytes;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  cudaError_t error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  if (shared_bytes < static_cast<int>(sizeof(Memory))) {  // Turing
    return LaunchExhaustiveSearch(args, M::kKind, stream);
  }
  const Batch clouds = Clouds(args);
  const int64_t num_clouds = Count(clouds);
  const int64_t per_entry = CeilDiv(args.Q, Stages<M, kSets>::kQueries), blocks = Count(args.batch) * per_entry;
  if (blocks == 0) return cudaSuccess;
  const int64_t per_cloud = CeilDiv(Tiles(args.P) * kColumns, kPrepareThreads);
  error = CheckGrid(max(blocks, num_clouds * max(per_cloud, int64_t{kParts})));
  if (error != cudaSuccess) return error;
  Scratch scratch;
  if (Divide(memory, num_clouds, args.P, scratch) > bytes) return cudaErrorMemoryAllocation;
  FindExtents<M, float>
      <<<static_cast<unsigned>(num_clouds * kParts), kExtentThreads, 0, stream>>>(args, clouds, scratch.extents);
  if (error = cudaGetLastError(); error != cudaSuccess) return error;
  Prepare<M><<<static_cast<unsigned>(num_clouds * per_cloud), kPrepareThreads, 0, stream>>>(
      args, clouds, static_cast<unsigned>(per_cloud), scratch);
  if (error = cudaGetLastError(); error != cudaSuccess) return error;
  if (error = AllowSharedMemory(FilterKernel<M, kSets>, sizeof(Memory)); error != cudaSuccess) return error;
  FilterKernel<M, kSets><<<static_cast<unsigned>(blocks), kWarps * kWarp, sizeof(Memory), stream>>>(
      args, clouds, static_cast<unsigned>(per_entry), scratch);
  return cudaGetLastError();
}

template <class M>
cudaError_t LaunchForK(const Search<float>& args, void* memory, int64_t bytes, cudaStream_t stream) {
  static_assert(kFilterMaxK == 2 * kWarp);
  return args.K <= kWarp ? Launch<M, 1>(args, memory, bytes, stream) : Launch<M, 2>(args, memory, bytes, stream);
}

}  // namespace
}  // namespace knn::KNN_ISA

namespace knn {

cudaError_t LaunchFilterSearch(const Search<float>& args, MetricKind metric, void* scratch, int64_t bytes,
                               cudaStream_t stream) {
  return metric == MetricKind::kAnisotropic
             ? KNN_ISA::LaunchForK<KNN_ISA::Anisotropic<float>>(args, scratch, bytes, stream)
             : KNN_ISA::LaunchForK<KNN_ISA::Isotropic<float>>(args, scratch, bytes, stream);
}

}  // namespace knn
