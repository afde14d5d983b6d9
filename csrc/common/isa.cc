// Picks the instruction set at run time. Compiled once, for the plainest machine.

#include <cstdlib>
#include <cstring>

#include "common/cpu.h"

#ifdef KNN_AVX2
#include <cpuid.h>
#endif

namespace knn {
namespace {

#ifdef KNN_AVX2
// Everything that -march=x86-64-v3 lets a compiler use, and that the operating system saves its registers.
bool HasV3() {
  // Compilers know these three by name only since recently.
  constexpr unsigned kF16c = 1u << 29, kMovbe = 1u << 22, kLzcnt = 1u << 5;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & kF16c) == 0 || (ecx & kMovbe) == 0) return false;
  if (!__get_cpuid(0x80000001u, &eax, &ebx, &ecx, &edx) || (ecx & kLzcnt) == 0) return false;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

#ifdef KNN_AVX512
bool HasV4() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool HasV4() { return false; }
#endif
#endif

Isa Supported() {
#ifdef KNN_AVX2
  __builtin_cpu_init();
  if (HasV3()) return HasV4() ? Isa::avx512 : Isa::avx2;
#endif
  return Isa::baseline;
}

Isa Pick() {
  const Isa best = Supported();
  const char* asked = std::getenv("JAX_KNN_AGGREGATE_ISA");
  if (asked == nullptr) return best;
  constexpr Isa kAll[] = {Isa::baseline, Isa::avx2, Isa::avx512};
  for (Isa isa : kAll) {
    if (isa < best && std::strcmp(asked, IsaName(isa)) == 0) return isa;
  }
  return best;
}

}  // namespace

Isa BestIsa() {
  static const Isa isa = Pick();
  return isa;
}

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    default:
      return "baseline";
  }
}

}  // namespace knn
