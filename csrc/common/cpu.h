// How a CPU kernel is described to the code that runs it, and which instruction sets kernels are compiled for.

#ifndef JKA_COMMON_CPU_H_
#define JKA_COMMON_CPU_H_

#include <cstdint>

namespace knn {

inline constexpr int kMaxPhases = 10;

// Work in phases, each split into independent tasks. A phase starts when the one before is done. Tasks must write
// disjoint memory, and what they compute must not depend on which thread runs them or in what order.
template <class Args>
struct CpuKernel {
  struct Phase {
    int64_t (*tasks)(const Args&);
    void (*run)(const Args&, void* scratch, int64_t task);
  };
  int64_t (*scratch_bytes)(const Args&);  // of one block for all phases, aligned to 64; may be null
  Phase phases[kMaxPhases];               // those behind the last are null
};

// Every CPU kernel file is compiled once for each of these, with KNN_ISA set to the name, which is also the namespace
// that the code ends up in; KNN_BEST calls a function of the best of them. CMake defines KNN_AVX2 where the compiler
// can target them, and KNN_AVX512 with it unless fewer are asked for.
#if defined(KNN_AVX512)
#define KNN_FOR_EACH_ISA(DO) DO(baseline) DO(avx2) DO(avx512)
#define KNN_BEST(...) \
  (BestIsa() == Isa::avx512 ? avx512::__VA_ARGS__ : BestIsa() == Isa::avx2 ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#elif defined(KNN_AVX2)
#define KNN_FOR_EACH_ISA(DO) DO(baseline) DO(avx2)
#define KNN_BEST(...) (BestIsa() == Isa::avx2 ? avx2::__VA_ARGS__ : baseline::__VA_ARGS__)
#else
#define KNN_FOR_EACH_ISA(DO) DO(baseline)
#define KNN_BEST(...) baseline::__VA_ARGS__
#endif

// The best of them that this machine can run, picked once. JAX_KNN_AGGREGATE_ISA=baseline|avx2|avx512 asks for a lesser
// one, for tests.
enum class Isa { baseline, avx2, avx512 };
Isa BestIsa();
const char* IsaName(Isa isa);

}  // namespace knn

#endif  // JKA_COMMON_CPU_H_
