// What the kernels of the Gaussian rasterizer take: those that list Gaussians by tile, and those that blend them.

#ifndef JKA_SPLAT_SPLAT_H_
#define JKA_SPLAT_SPLAT_H_

#include "common/input.h"

namespace knn {

// Side of the square tiles that lists are made for, and in which `reach` counts.
inline constexpr int kTile = 16;

// Scratch of the CUDA kernel that makes lists: keys twice and numbers twice, of each Gaussian or pair, whichever are
// more, and the sort's byte; and kSortBytes of knn/index/index.h, which CUB takes for histograms.
inline constexpr int64_t kTilesBytesOfItem = 4 * 4 + 1;

// The lists of a batch entry. Ranks number Gaussians front to back. A pair is a tile and a Gaussian that may count in
// it; slots number pairs by Gaussian (CUDA) or rank (CPU), then by tile. There may be more pairs than the lists hold:
// then only order and offsets mean anything, and who needs lists goes through all Gaussians for each tile.
template <class Int>
struct Lists {
  Operand<Int> order;    // [P]: which Gaussian has each rank
  Operand<Int> offsets;  // [P + 1]: where each Gaussian's or rank's slots begin; the last is how many there are
  Operand<Int> owners;   // [capacity]: the Gaussian of each slot
  Operand<Int> slots;    // [capacity]: sorted by tile, then by rank
  Operand<Int> ends;     // [tiles]: where each tile's slots end among these
};

// An image and its tiles, row after row.
struct Screen {
  int width, height;
};

template <class T>
struct Tiles {
  Batch batch;
  int64_t P, capacity;
  Screen screen;
  Operand<const T> means, conics, opacities;  // [P, 2], [P, 3], [P]
  Operand<const float> depths;                // [P]
  Operand<const int32_t> reach;               // [P, 4], or null
  Lists<int32_t> lists;                       // in full batch
};

// One struct serves forward (image and what is behind it) and backward (gradients from there). Operands that are not
// given, and results that are not asked for, are null. Sizes after the batch axes stand behind each array.
template <class T>
struct Splat {
  Batch batch;
  int64_t P, capacity;
  int channel_count;
  Screen screen;
  bool dual;  // whether anything moves

  Input<T> means, conics, opacities, channels, background;  // [P, 2], [P, 3], [P], [P, C], [C]
  Lists<const int32_t> lists;
  Operand<const int32_t> reach;  // [P, 4], or null

  // Forward: given tangents, derivatives along them. In full batch.
  T *image, *alpha;   // [height, width, C], [height, width]
  T* through_out;     // [1 or 2, height, width]: final transmittance, and its tangent
  int32_t* last_out;  // [height, width]: behind which of the tile's Gaussians (of all, without lists) a pixel ends

  // Backward: gradients of ⟨ct, (image, alpha)⟩, or their derivatives along tangents, in full batch.
  Operand<const T> through;  // what forward gave
  Operand<const int32_t> last;
  Input<T> image_ct, alpha_ct;  // [height, width, C], [height, width]
  T *means_bar, *conics_bar, *opacities_bar, *channels_bar, *background_bar;
};

}  // namespace knn

namespace knn::KNN_ISA {

KNN_FN int TileColumns(const Screen& s) { return (s.width + kTile - 1) / kTile; }
KNN_FN int TileRows(const Screen& s) { return (s.height + kTile - 1) / kTile; }
KNN_FN int TileCount(const Screen& s) { return TileColumns(s) * TileRows(s); }

}  // namespace knn::KNN_ISA

#endif  // JKA_SPLAT_SPLAT_H_
