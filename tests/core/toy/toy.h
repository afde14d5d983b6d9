// A toy op: y_i = e_i sin(a x_i), where e_i is table[k_i], or 0 if the table has no such entry. For a cotangent c of y:
//
//   ā = Σ_i c_i e_i cos(a x_i) x_i      x̄_i = c_i e_i cos(a x_i) a      tablē_j = Σ_{i: k_i = j} c_i sin(a x_i)
//
// Over dual numbers, of which a kernel returns the tangents, y becomes the jvp, and gradients their derivative along
// the tangents: all that second order needs, as the Hessian of ⟨c, y⟩ is symmetric.

#include <algorithm>

#include "common/cpu.h"
#include "common/input.h"

namespace knn::KNN_ISA {

template <class T>
struct Toy {
  Batch batch;
  int64_t N, entries;
  Input<T> a, x, table;              // (), [N], [entries]
  Operand<const int32_t> k;          // [N]
  Input<T> ct;                       // [N], where gradients are wanted
  T *a_bar, *x_bar, *table_bar, *y;  // in full batch; null where not wanted
};

template <class N>
KNN_FN N Value(N a, N x, N entry) {
  return entry * Sin(a * x);
}
template <class N>
KNN_FN void Vjp(N a, N x, N entry, N ct, N* a_bar, N* x_bar, N* entry_bar) {
  const N slope = ct * entry * Cos(a * x);
  *a_bar = slope * x, *x_bar = slope * a, *entry_bar = ct * Sin(a * x);
}

// Of one batch entry, so that no two tasks write to one table, and all sums are in a fixed order. N is T or Dual<T>.
template <class T, class N>
void Run(const Toy<T>& args, void* /*scratch*/, int64_t b) {
  const Row<N, T> a(args.a, args.batch, b), x(args.x, args.batch, b), table(args.table, args.batch, b);
  const Row<N, T> ct(args.ct, args.batch, b);
  const int32_t* k = At(args.k, args.batch, b);
  if (args.table_bar != nullptr) std::fill_n(args.table_bar + b * args.entries, args.entries, T(0));
  N a_sum = {}, a_bar, x_bar, entry_bar;
  for (int64_t i = 0; i < args.N; ++i) {
    const bool exists = Names(k[i], args.entries);
    const N entry = exists ? table[k[i]] : N{};
    if (args.y != nullptr) args.y[b * args.N + i] = Result(Value(a[0], x[i], entry));
    if (!ct.given()) continue;
    Vjp(a[0], x[i], entry, ct[i], &a_bar, &x_bar, &entry_bar);
    a_sum = a_sum + a_bar;
    if (args.x_bar != nullptr) args.x_bar[b * args.N + i] = Result(x_bar);
    if (args.table_bar != nullptr && exists) args.table_bar[b * args.entries + k[i]] += Result(entry_bar);
  }
  if (args.a_bar != nullptr) args.a_bar[b] = Result(a_sum);
}

template <class T>
CpuKernel<Toy<T>> ToyKernel(bool dual) {
  return {nullptr, {{[](const Toy<T>& args) { return Count(args.batch); }, dual ? Run<T, Dual<T>> : Run<T, T>}}};
}

}  // namespace knn::KNN_ISA
