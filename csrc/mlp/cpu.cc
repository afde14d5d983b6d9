// The perceptron on CPUs.
//
// A task takes tiles of rows through all layers and back, so that what layers pass on stays in the cache. A tile is cut
// into panels of two vectors of rows, and a panel has its features one after another: a product with a matrix of any
// size and orientation then reads vectors of rows, and single weights where they lie. Of dual numbers, values and
// tangents are tiles of their own, and those that are zero for want of tangents do not exist.
//
// Sums over rows are kept by pieces, runs of tiles whose number depends on sizes alone, and added up in the order of
// the pieces: the same bits whatever threads do.

#include "mlp/cpu.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <thread>
#include <type_traits>

#include "common/simd_math.h"
#include "mlp/formulas.h"

namespace knn::KNN_ISA {
namespace {

template <class T>
inline constexpr int kPanel = 2 * Vec<T>::kLanes;  // rows
// Features from one panel to the next: an odd number, as panels a power of two apart would share few sets of the cache.
KNN_FN constexpr int64_t Step(int64_t width) { return width | 1; }
// A tile has as many rows as need so many bytes, within limits; fewer where there would be fewer tiles than kShares.
inline constexpr int64_t kTileBytes = 320 << 10, kLeastRows = 64, kMostRows = 128, kShares = 16;

// ---- Transposition

template <class T, class S>
KNN_FN void Convert(S x, Stored stored, T* out) {
  if constexpr (std::is_same_v<T, Float16>) {
    Narrow(x, stored, out);
  } else {
    *out = Widen(x, stored);
  }
}

// out[k, r] = x[r, k] for n rows of `columns`; steps are from one row to the next.
template <class T, class S>
void Transposed(const S* x, int64_t step, int64_t n, int64_t columns, Stored stored, T* out, int64_t out_step) {
  int64_t whole_rows = 0, whole_columns = 0;
  if constexpr (std::is_same_v<T, S>) {
    constexpr int kLanes = Vec<T>::kLanes;
    whole_rows = n / kLanes * kLanes, whole_columns = columns / kLanes * kLanes;
    for (int64_t r = 0; r < whole_rows; r += kLanes) {
      for (int64_t k = 0; k < whole_columns; k += kLanes) {
        Vec<T> block[kLanes];
        for (int v = 0; v < kLanes; ++v) block[v] = Vec<T>::Load(x + (r + v) * step + k);
        Transpose(block);
        for (int v = 0; v < kLanes; ++v) block[v].Store(out + (k + v) * out_step + r);
      }
    }
  }
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t k = r < whole_rows ? whole_columns : 0; k < columns; ++k) {
      Convert(x[r * step + k], stored, out + k * out_step + r);
    }
  }
}

// ---- Matrix products

// Element (o, i) of a matrix that has `out` steps from one o to the next, and `in` from one i to the next; behind every
// `run` of these, `jump` besides.
template <class T>
struct Weights {
  const T* at;
  int64_t out, in;
  int64_t run = int64_t{1} << 40, jump = 0;
};

// y_o = Σ_i w_oi x_i + bias_o for kOut features of a panel; added to y_o instead of bias_o if `add`.
template <int kOut, class T>
KNN_FN void MultiplyPanel(Weights<T> w, int64_t ins, const T* x, const T* bias, bool add, T* y) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  V sum[kOut][2];
#pragma GCC unroll 8
  for (int o = 0; o < kOut; ++o) {
    const V start = V::Broadcast(bias == nullptr ? T(0) : bias[o]);
    sum[o][0] = add ? V::Load(y + o * kPanel<T>) : start;
    sum[o][1] = add ? V::Load(y + o * kPanel<T> + kLanes) : start;
  }
  for (; ins > 0; ins -= w.run, w.at += w.jump) {
    for (int64_t i = Min(ins, w.run); i > 0; --i, w.at += w.in, x += kPanel<T>) {
      const V x0 = V::Load(x), x1 = V::Load(x + kLanes);
#pragma GCC unroll 8
      for (int o = 0; o < kOut; ++o) {
        const V weight = V::Broadcast(w.at[o * w.out]);
        sum[o][0] = Fma(weight, x0, sum[o][0]);
        sum[o][1] = Fma(weight, x1, sum[o][1]);
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOut; ++o) {
    sum[o][0].Store(y + o * kPanel<T>);
    sum[o][1].Store(y + o * kPanel<T> + kLanes);
  }
}

// The same for all features of all panels.
template <class T>
void Multiply(Weights<T> w, int outs, int64_t ins, const T* x, const T* bias, bool add, int panels, T* y) {
  const auto some = [&](auto count, int o) {
    Weights<T> part = w;
    part.at += o * w.out;
    for (int p = 0; p < panels; ++p) {
      MultiplyPanel<decltype(count)::value>(part, ins, x + p * Step(ins) * kPanel<T>,
                                            bias == nullptr ? nullptr : bias + o, add,
                                            y + (p * Step(outs) + o) * kPanel<T>);
    }
  };
  int o = 0;
  for (; o + 6 <= outs; o += 6) some(std::integral_constant<int, 6>(), o);
  for (; o + 3 <= outs; o += 3) some(std::integral_constant<int, 3>(), o);
  for (; o < outs; ++o) some(std::integral_constant<int, 1>(), o);
}

// sums[o, i] += Σ β_o h_i over a tile's n rows, as a product of β with the transpose of h; `memory` takes kPanel
// features of a tile. Sums lie in panels of kPanel i, in which those of each o are
// together.
template <class T>
void AddOuter(const T* beta, int outs, const T* h, int ins, int64_t n, T* memory, T* sums) {
  const Weights<T> w = {beta, kPanel<T>, 1, kPanel<T>, (Step(outs) - 1) * kPanel<T>};
  for (int i = 0; i < ins; i += kPanel<T>, sums += int64_t{outs} * kPanel<T>) {
    const int some = static_cast<int>(Min(kPanel<T>, ins - i));
    for (int64_t row = 0; row < n; row += kPanel<T>) {
      const T* panel = h + (row / kPanel<T> * Step(ins) + i) * kPanel<T>;
      Transposed(panel, kPanel<T>, some, kPanel<T>, Stored::whole, memory + row * kPanel<T>, kPanel<T>);
    }
    Multiply<T>(w, outs, n, memory, nullptr, true, 1, sums);
  }
}
template <class T>
void AddRows(const T* beta, int outs, int panels, T* sums) {
  for (int o = 0; o < outs; ++o) {
    Vec<T> sum = {};
    for (int p = 0; p < panels; ++p) {
      const T* at = beta + (p * Step(outs) + o) * kPanel<T>;
      sum = sum + Vec<T>::Load(at) + Vec<T>::Load(at + Vec<T>::kLanes);
    }
    sums[o] += Sum(sum);
  }
}

// ---- Activations

// Of n elements: h = σ(p), ḣ = σ'(p) ṗ, and with `back` σ' in place of p and σ'' ṗ in place of ṗ. ṗ is null if zero.
template <class T>
void ActivateTile(const Activation& activation, int64_t n, bool back, T* p, T* dp, T* h, T* dh) {
  using V = Vec<T>;
  WithKind(activation.kind, [&](auto kind) {
    for (int64_t i = 0; i < n; i += V::kLanes) {
      const Jet<V> jet = Activate<decltype(kind)::value>(V::Load(p + i), activation.parameter);
      if (dp != nullptr) {
        const V along = V::Load(dp + i);
        if (back) (jet.bend * along).Store(dp + i);
        (jet.slope * along).Store(dh + i);
      }
      if (back) jet.slope.Store(p + i);
      jet.value.Store(h + i);
    }
  });
}

// Whether σ'' is 0 everywhere.
inline bool Flat(ActivationKind kind) {
  return kind == ActivationKind::none || kind == ActivationKind::relu || kind == ActivationKind::leaky_relu;
}

// From the gradient a in h to that in p, β = a σ', and β̇ = ȧ σ' + a (σ'' ṗ): each in the place of its a. The latter
// terms are zero where they are null.
template <class T>
void ThroughActivation(int64_t n, const T* slope, const T* bend, bool dual, T* a, T* da) {
  using V = Vec<T>;
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const V at = V::Load(a + i), s = V::Load(slope + i);
    (at * s).Store(a + i);
    if (!dual) continue;
    const V moved = V::Load(da + i) * s;
    (bend == nullptr ? moved : Fma(at, V::Load(bend + i), moved)).Store(da + i);
  }
}

// ---- Rows in memory and in tiles

// Columns [first, first + columns) of a tile of `width` from n rows of x; zero if x is null.
template <class T, class S>
void LoadRows(const S* x, Stored stored, int64_t n, int64_t columns, int first, int width, T* tile) {
  for (int64_t row = 0; row < n; row += kPanel<T>) {
    T* panel = tile + (row / kPanel<T> * Step(width) + first) * kPanel<T>;
    const int64_t rows = Min(kPanel<T>, n - row);
    if (x == nullptr || rows < kPanel<T>) std::fill_n(panel, columns * kPanel<T>, T(0));
    if (x != nullptr) Transposed(x + row * columns, columns, rows, columns, stored, panel, kPanel<T>);
  }
}

template <class T, class S>
void StoreRows(const T* tile, Stored stored, int64_t n, int64_t columns, int first, int width, S* y) {
  for (int64_t row = 0; row < n; row += kPanel<T>) {
    const T* panel = tile + (row / kPanel<T> * Step(width) + first) * kPanel<T>;
    Transposed(panel, kPanel<T>, columns, Min(kPanel<T>, n - row), stored, y + row * columns, columns);
  }
}

// Zeros in the rows behind the first n, in the last of the panels that these need.
template <class T>
void ClearBehind(T* tile, int64_t n, int width) {
  if (tile == nullptr || n % kPanel<T> == 0) return;
  T* panel = tile + n / kPanel<T> * Step(width) * kPanel<T>;
  for (int k = 0; k < width; ++k) std::fill(panel + k * kPanel<T> + n % kPanel<T>, panel + (k + 1) * kPanel<T>, T(0));
}

// As if stored in S and read again.
template <class S, class T>
void Round(Stored stored, int64_t n, T* x) {
  if constexpr (!std::is_same_v<S, T>) {
    for (int64_t i = 0; x != nullptr && i < n; ++i) {
      S narrow;
      Narrow(x[i], stored, &narrow);
      x[i] = Widen(narrow, stored);
    }
  }
}

// ---- The network

template <class T, class S>
struct Network {
  using Args = Mlp<T, S>;
  static constexpr bool kNarrow = !std::is_same_v<T, S>;

  // What a layer keeps of a tile: h and ḣ, and, for the way back, σ' and σ'' ṗ, where p and ṗ were. Of "layer 0", h is
  // x.
  struct Layer {
    T *h, *dh, *p, *dp;
  };

  const Args& args;
  bool back, dual, sums;
  int lowest;                   // the way back ends at the gradient in this h, or in the weight that multiplies it
  bool moves[kMaxLayers + 1];   // whether ḣ is not zero
  bool turns[kMaxLayers + 1];   // whether ȧ is not zero
  bool curved[kMaxLayers + 1];  // whether σ'' ṗ is not zero
  int64_t tile, row_size;       // rows of a tile; elements that each needs
  Layer layer[kMaxLayers + 1];
  T *a[2], *da[2];  // gradients in h of a layer and of that below
  T* turned;        // memory of AddOuter

  explicit Network(const Args& args) : args(args) {
    const int L = args.layers;
    sums = WantsSums(args);
    back = sums || WantsRows(args);
    dual = HasTangents(args);
    lowest = 0;
    if (!WantsRows(args)) {
      while (lowest < L - 1 && args.weight_bar[lowest] == nullptr && args.bias_bar[lowest] == nullptr) ++lowest;
    }
    moves[0] = curved[0] = false;
    for (int i = 0; i < args.parts; ++i) moves[0] |= args.x[i].tangent.data != nullptr;
    for (int l = 1; l <= L; ++l) {
      moves[l] = moves[l - 1] || Moves(args.weight[l - 1]) || Moves(args.bias[l - 1]);
      curved[l] = moves[l] && !Flat(Of(l).kind);
    }
    turns[L] = Moves(args.ct);
    for (int l = L; l > 0; --l) turns[l - 1] = turns[l] || curved[l] || Moves(args.weight[l - 1]);
    tile = 1;
    row_size = Place(nullptr);
    tile = std::clamp<int64_t>(kTileBytes / (row_size * sizeof(T)), kLeastRows, kMostRows);
    tile = Min(tile,
               Max(CeilDiv(args.N * Max(Count(args.batch), 1), kShares), 2 * kPanel<T>));  // work for several threads
    tile = CeilDiv(Min(tile, Max(args.N, 1)), kPanel<T>) * kPanel<T>;
  }

  static bool Moves(const Input<S>& input) { return input.tangent.data != nullptr; }
  const Activation& Of(int l) const { return l == args.layers ? args.output_activation : args.activation; }

  // Lays a tile out in memory; returns how many elements that takes. Without a way back h is in the place of p, and two
  // layers' are enough.
  int64_t Place(T* memory) {
    int64_t used = 0;
    const auto take = [&](bool needed, int64_t width) {
      T* at = needed && memory != nullptr ? memory + used : nullptr;
      used += needed ? Step(width) * tile : 0;
      return at;
    };
    int64_t most = 0;
    for (int l = 0; l <= args.layers; ++l) most = Max(most, args.width[l]);
    for (int l = 0; l <= args.layers; ++l) {
      const int64_t width = args.width[l];
      if (!back && l >= 2) {
        layer[l] = layer[l - 2];
        continue;
      }
      Layer& at = layer[l];
      at.h = take(true, back ? width : most);
      at.dh = take(back ? moves[l] : dual, back ? width : most);
      at.p = back ? take(l > 0, width) : at.h;
      at.dp = back ? take(l > 0 && moves[l], width) : at.dh;
    }
    for (int i = 0; i < 2; ++i) {
      a[i] = take(back, most);
      da[i] = take(back && dual, most);
    }
    turned = take(sums, kPanel<T>);
    return used;
  }

  // ---- Sizes of the whole call

  // The elements of the sums of one piece: for each layer those of its weight, then of its bias, where wanted.
  int64_t WeightSize(int l) const { return int64_t{args.width[l]} * args.width[l + 1]; }
  int64_t WeightSums(int l) const { return CeilDiv(args.width[l], kPanel<T>) * kPanel<T> * args.width[l + 1]; }
  int64_t SumsOf(int l) const {
    return (args.weight_bar[l] == nullptr ? 0 : WeightSums(l)) + (args.bias_bar[l] == nullptr ? 0 : args.width[l + 1]);
  }
  int64_t SumSize(int l_end) const {
    int64_t size = 0;
    for (int l = 0; l < l_end; ++l) size += SumsOf(l);
    return size;
  }

  // Entries of sum_batch, tiles that go into each, and pieces that these are cut into.
  int64_t Entries() const { return Count(args.sum_batch); }
  int64_t TilesOfRows() const { return CeilDiv(args.N, tile); }
  int64_t Tiles() const { return Count(args.batch) / Max(1, Entries()) * TilesOfRows(); }
  int64_t Pieces() const {
    // Sums take memory, and time that rows have to make up for.
    constexpr int64_t kMost = 64, kBytes = 64 << 20;
    const int64_t bytes = sums ? SumSize(args.layers) * sizeof(T) : 0;
    const int64_t most = bytes > 0 ? std::clamp<int64_t>(kBytes / bytes, 8, kMost) : 4 * kMost;
    const int64_t least_rows = std::clamp<int64_t>(bytes >> 10, 64, 512);
    return Max(1, Min(CeilDiv(Tiles() * tile, least_rows), Min(Tiles(), most / Max(1, Entries()))));
  }
  int64_t Tasks() const { return Entries() * Pieces(); }

  // ---- Memory: slots, of which a task takes one for as long as it runs; widened weights; sums of all pieces

  static constexpr int kSlots = 64;
  struct Slots {
    std::atomic<bool> taken[kSlots];
  };
  int64_t SlotCount() const { return Min(kSlots, Tasks()); }
  int64_t SlotSize() const { return CeilDiv(row_size * tile, 16) * 16; }
  // Copies of parameters: of those in 16 bits, as T; and of weights, for the way back, transposed.
  struct Parameter {
    const Operand<const S>* from;
    int64_t rows, columns;
    bool wide, transposed;
    int64_t Size() const { return rows * columns; }
  };
  template <class Visit>
  void ForEachParameter(Visit&& visit) const {
    for (int l = 0; l < args.layers; ++l) {
      const int64_t ins = args.width[l], outs = args.width[l + 1];
      for (const auto* o : {&args.weight[l].value, &args.weight[l].tangent}) {
        visit(Parameter{o, outs, ins, kNarrow, back});
      }
      for (const auto* o : {&args.bias[l].value, &args.bias[l].tangent}) visit(Parameter{o, 1, outs, kNarrow, false});
    }
  }
  int64_t EntriesOf(const Operand<const S>& o) const {
    int64_t entries = o.data == nullptr ? 0 : 1;
    for (int b = 0; b < args.batch.ndim; ++b) entries *= o.stride[b] == 0 ? 1 : args.batch.size[b];
    return entries;
  }
  int64_t CopySize() const {
    int64_t size = 0;
    ForEachParameter([&](const Parameter& p) { size += EntriesOf(*p.from) * p.Size() * (p.wide + p.transposed); });
    return size;
  }
  int64_t CopyItems() const {
    int64_t items = 0;
    ForEachParameter([&](const Parameter& p) { items += p.wide || p.transposed ? EntriesOf(*p.from) : 0; });
    return items;
  }
  // Item i of these.
  void Copy(void* scratch, int64_t i) const {
    T* to = Copies(scratch);
    ForEachParameter([&](const Parameter& p) {
      if (!p.wide && !p.transposed) return;
      const int64_t entries = EntriesOf(*p.from), at = i * p.Size();
      if (i >= 0 && i < entries) {
        const S* from = p.from->data + at;
        if (p.wide) {
          for (int64_t k = 0; k < p.Size(); ++k) Convert(from[k], args.stored, to + at + k);
        }
        if (p.transposed) {
          T* out = to + at + (p.wide ? entries * p.Size() : 0);
          Transposed(from, p.columns, p.rows, p.columns, args.stored, out, p.rows);
        }
      }
      to += entries * p.Size() * (p.wide + p.transposed);
      i -= entries;
    });
  }
  int64_t Bytes() const {
    const int64_t sum_size = sums ? Tasks() * SumSize(args.layers) : 0;
    return sizeof(Slots) + (SlotCount() * SlotSize() + CopySize() + sum_size) * sizeof(T);
  }
  T* SlotAt(void* scratch, int64_t slot) const {
    return reinterpret_cast<T*>(static_cast<char*>(scratch) + sizeof(Slots)) + slot * SlotSize();
  }
  T* Copies(void* scratch) const { return SlotAt(scratch, SlotCount()); }
  T* SumsAt(void* scratch, int64_t task) const { return Copies(scratch) + CopySize() + task * SumSize(args.layers); }

  // ---- One tile

  // A layer's parameters in a batch entry, as T.
  struct Parameters {
    const T *weight, *d_weight, *bias, *d_bias, *transposed, *d_transposed;
  };
  void Find(int64_t entry, void* scratch, Parameters (&at)[kMaxLayers]) const {
    const T* copy = Copies(scratch);
    int n = 0;
    ForEachParameter([&](const Parameter& p) {
      const S* data = AtOrNull(*p.from, args.batch, entry);
      const int64_t offset = data == nullptr ? 0 : data - p.from->data, size = EntriesOf(*p.from) * p.Size();
      const T *found = nullptr, *transposed = nullptr;
      if constexpr (kNarrow) {
        if (data != nullptr) found = copy + offset;
        copy += size;
      } else {
        found = data;
      }
      if (p.transposed) {
        if (data != nullptr) transposed = copy + offset;
        copy += size;
      }
      Parameters& layer = at[n / 4];
      const int which = n++ % 4;
      (which == 0 ? layer.weight : which == 1 ? layer.d_weight : which == 2 ? layer.bias : layer.d_bias) = found;
      if (which < 2) (which == 0 ? layer.transposed : layer.d_transposed) = transposed;
    });
  }

  const S* RowsAt(const Operand<const S>& o, int64_t entry, int64_t first, int64_t width) const {
    const S* data = AtOrNull(o, args.batch, entry);
    return data == nullptr ? nullptr : data + first * width;
  }
  void Give(const T* tile, int64_t entry, int64_t first, int64_t n, int columns, int from, int width, S* out) const {
    if (out == nullptr) return;
    S* to = out + (entry * args.N + first) * columns;
    if (tile != nullptr) return StoreRows(tile, args.stored, n, columns, from, width, to);
    S zero;
    Narrow(T(0), args.stored, &zero);
    std::fill_n(to, n * columns, zero);
  }

  // Rows [first, first + n) of a batch entry; adds to `sum`.
  void Run(int64_t entry, const Parameters (&at)[kMaxLayers], int64_t first, int64_t n, T* sum) const {
    const int L = args.layers, outputs = args.width[L], panels = static_cast<int>(CeilDiv(n, kPanel<T>));
    int column = 0;
    for (int i = 0; i < args.parts; ++i) {
      const int columns = args.part_width[i], width = args.width[0];
      LoadRows(RowsAt(args.x[i].value, entry, first, columns), args.stored, n, columns, column, width, layer[0].h);
      if (moves[0]) {
        LoadRows(RowsAt(args.x[i].tangent, entry, first, columns), args.stored, n, columns, column, width, layer[0].dh);
      }
      column += columns;
    }

    for (int l = 1; l <= L; ++l) {
      const Parameters& q = at[l - 1];
      const Layer &below = layer[l - 1], &here = layer[l];
      const int ins = args.width[l - 1], outs = args.width[l];
      const int64_t size = panels * Step(outs) * kPanel<T>;
      Multiply<T>({q.weight, ins, 1}, outs, ins, below.h, q.bias, false, panels, here.p);
      if (moves[l - 1]) Multiply<T>({q.weight, ins, 1}, outs, ins, below.dh, q.d_bias, false, panels, here.dp);
      if (q.d_weight != nullptr) {
        const T* bias = moves[l - 1] ? nullptr : q.d_bias;
        Multiply<T>({q.d_weight, ins, 1}, outs, ins, below.h, bias, moves[l - 1], panels, here.dp);
      } else if (q.d_bias != nullptr && !moves[l - 1]) {
        Multiply<T>({q.weight, ins, 1}, outs, 0, below.h, q.d_bias, false, panels, here.dp);
      }
      ActivateTile(Of(l), size, back, here.p, moves[l] ? here.dp : nullptr, here.h, here.dh);
      Round<S>(args.stored, size, here.h);
      if (moves[l]) Round<S>(args.stored, size, here.dh);
    }
    const T* y = dual ? (moves[L] ? layer[L].dh : nullptr) : layer[L].h;
    Give(y, entry, first, n, outputs, 0, outputs, args.y);
    if (back) RunBack(entry, at, first, n, sum);
  }

  void RunBack(int64_t entry, const Parameters (&at)[kMaxLayers], int64_t first, int64_t n, T* sum) const {
    const int L = args.layers, outputs = args.width[L], panels = static_cast<int>(CeilDiv(n, kPanel<T>));
    T *above = a[0], *below = a[1], *d_above = da[0], *d_below = da[1];
    LoadRows(RowsAt(args.ct.value, entry, first, outputs), args.stored, n, outputs, 0, outputs, above);
    if (turns[L]) {
      LoadRows(RowsAt(args.ct.tangent, entry, first, outputs), args.stored, n, outputs, 0, outputs, d_above);
    }
    for (int l = L; l > lowest; --l) {
      const Parameters& q = at[l - 1];
      const Layer &here = layer[l], &under = layer[l - 1];
      const int ins = args.width[l - 1], outs = args.width[l];
      const int64_t size = panels * Step(outs) * kPanel<T>, size_below = panels * Step(ins) * kPanel<T>;
      const bool moving = turns[l] || curved[l];
      if (!turns[l] && curved[l]) std::fill_n(d_above, size, T(0));
      if (Of(l).kind != ActivationKind::none) {
        ThroughActivation(size, here.p, curved[l] ? here.dp : nullptr, moving, above, d_above);
      }
      T* d_beta = moving ? d_above : nullptr;
      if (sum != nullptr && SumsOf(l - 1) > 0) {
        T* to = sum + SumSize(l - 1);
        T* source = dual ? d_beta : above;
        if (args.weight_bar[l - 1] != nullptr) {
          if (source != nullptr) AddOuter(source, outs, under.h, ins, n, turned, to);
          if (dual && moves[l - 1]) AddOuter(above, outs, under.dh, ins, n, turned, to);
          to += WeightSums(l - 1);
        }
        if (args.bias_bar[l - 1] != nullptr && source != nullptr) {
          ClearBehind(source, n, outs);
          AddRows(source, outs, panels, to);
        }
      }
      if (l - 1 == lowest && !WantsRows(args)) break;
      if (l > 1 || !dual || q.d_weight != nullptr) {
        Multiply<T>({q.transposed, outs, 1}, ins, outs, above, nullptr, false, panels, below);
      }
      if (moving) Multiply<T>({q.transposed, outs, 1}, ins, outs, d_above, nullptr, false, panels, d_below);
      if (q.d_weight != nullptr) {
        Multiply<T>({q.d_transposed, outs, 1}, ins, outs, above, nullptr, moving, panels, d_below);
      }
      Round<S>(args.stored, size_below, below);
      if (turns[l - 1]) Round<S>(args.stored, size_below, d_below);
      std::swap(above, below);
      std::swap(d_above, d_below);
    }
    const T* x_bar = dual ? (turns[0] ? d_above : nullptr) : above;
    int column = 0;
    for (int i = 0; i < args.parts; ++i) {
      Give(x_bar, entry, first, n, args.part_width[i], column, args.width[0], args.x_bar[i]);
      column += args.part_width[i];
    }
  }
};

// ---- Phases

template <class T, class S>
struct Phases {
  using Args = Mlp<T, S>;
  using Net = Network<T, S>;

  static int64_t ScratchBytes(const Args& args) { return Net(args).Bytes(); }

  static int64_t SlotTasks(const Args&) { return 1; }
  static void FreeSlots(const Args&, void* scratch, int64_t /*task*/) { new (scratch) typename Net::Slots(); }

  // One task for all of a phase's items if they are little work, so that no thread is woken for it; else one for each.
  static int64_t Together(int64_t items, int64_t elements) { return elements < 1 << 16 ? Min(items, 1) : items; }

  static int64_t CopyTasks(const Args& args) {
    const Net net(args);
    return Together(net.CopyItems(), net.CopySize());
  }
  static void Copy(const Args& args, void* scratch, int64_t task) {
    const Net net(args);
    for (int64_t i = task; i < net.CopyItems(); i += CopyTasks(args)) net.Copy(scratch, i);
  }

  static int64_t PieceTasks(const Args& args) { return Net(args).Tasks(); }
  static void Piece(const Args& args, void* scratch, int64_t task) {
    using Slots = typename Net::Slots;
    Net net(args);
    Slots& slots = *static_cast<Slots*>(scratch);
    int64_t slot = 0;
    while (slots.taken[slot].exchange(true, std::memory_order_acquire)) {
      slot = (slot + 1) % net.SlotCount();
      if (slot == 0) std::this_thread::yield();
    }
    net.Place(net.SlotAt(scratch, slot));
    T* sum = net.sums ? net.SumsAt(scratch, task) : nullptr;
    if (sum != nullptr) std::fill_n(sum, net.SumSize(args.layers), T(0));
    const int64_t pieces = net.Pieces(), piece = task % pieces, of_rows = net.TilesOfRows(), tiles = net.Tiles();
    const SplitBatch split = Split(args.batch, args.sum_batch);
    typename Net::Parameters at[kMaxLayers];
    int64_t found = -1;
    for (int64_t i = tiles * piece / pieces; i < tiles * (piece + 1) / pieces; ++i) {
      const int64_t entry = Join(split, static_cast<uint32_t>(task / pieces), static_cast<uint32_t>(i / of_rows));
      if (entry != found) net.Find(found = entry, scratch, at);
      const int64_t first = i % of_rows * net.tile;
      net.Run(entry, at, first, Min(net.tile, args.N - first), sum);
    }
    slots.taken[slot].store(false, std::memory_order_release);
  }

  // Adds the sums of pieces up, a layer of an entry at a time.
  static int64_t SumTasks(const Args& args) {
    const Net net(args);
    return net.sums ? Together(net.Entries() * args.layers, net.Tasks() * net.SumSize(args.layers)) : 0;
  }
  static void Sum(const Args& args, void* scratch, int64_t task) {
    const Net net(args);
    for (int64_t i = task; i < net.Entries() * args.layers; i += SumTasks(args)) {
      AddPieces(args, net, scratch, i / args.layers, static_cast<int>(i % args.layers));
    }
  }
  static void AddPieces(const Args& args, const Net& net, void* scratch, int64_t entry, int l) {
    const int64_t pieces = net.Pieces();
    const int ins = args.width[l], outs = args.width[l + 1];
    int64_t from = net.SumSize(l);
    // The next n sums of all pieces, in parts; give(i, sum) for each.
    const auto add = [&](int64_t n, auto&& give) {
      constexpr int64_t kPart = 512;
      for (int64_t begin = 0; begin < n; begin += kPart) {
        double sums[kPart] = {};
        const int64_t some = Min(kPart, n - begin);
        for (int64_t piece = 0; piece < pieces; ++piece) {
          const T* part = net.SumsAt(scratch, entry * pieces + piece) + from + begin;
          for (int64_t i = 0; i < some; ++i) sums[i] += part[i];
        }
        for (int64_t i = 0; i < some; ++i) give(begin + i, static_cast<T>(sums[i]));
      }
      from += n;
    };
    if (args.weight_bar[l] != nullptr) {
      S* out = args.weight_bar[l] + entry * net.WeightSize(l);
      const int64_t panel = int64_t{outs} * kPanel<T>;
      add(net.WeightSums(l), [&](int64_t at, T sum) {
        const int64_t i = at / panel * kPanel<T> + at % kPanel<T>, o = at % panel / kPanel<T>;
        if (i < ins) Narrow(sum, args.stored, out + o * ins + i);
      });
    }
    if (args.bias_bar[l] != nullptr) {
      add(outs, [&](int64_t o, T sum) { Narrow(sum, args.stored, args.bias_bar[l] + entry * outs + o); });
    }
  }

  static constexpr CpuKernel<Args> kKernel = {
      &ScratchBytes,
      {{&SlotTasks, &FreeSlots}, {&CopyTasks, &Copy}, {&PieceTasks, &Piece}, {&SumTasks, &Sum}, {nullptr, nullptr}}};
};

}  // namespace

template <class T, class S>
CpuKernel<Mlp<T, S>> MlpKernel(const Mlp<T, S>& /*args*/) {
  return Phases<T, S>::kKernel;
}
template CpuKernel<Mlp<float, float>> MlpKernel(const Mlp<float, float>&);
template CpuKernel<Mlp<double, double>> MlpKernel(const Mlp<double, double>&);
template CpuKernel<Mlp<float, Float16>> MlpKernel(const Mlp<float, Float16>&);

}  // namespace knn::KNN_ISA
