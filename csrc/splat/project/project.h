// What the kernels that project Gaussians take: where a camera sees each, in which colour, and the derivatives of that.

#ifndef JKA_SPLAT_PROJECT_PROJECT_H_
#define JKA_SPLAT_PROJECT_PROJECT_H_

#include "common/input.h"
#include "splat/splat.h"

namespace knn {

// A camera: rotation (rows), translation, focal lengths, principal point; where colours are seen, its centre besides.
inline constexpr int kCameraSize = 16, kCameraSizeWithCentre = 19;

// Harmonics of degree 3, which is the largest.
inline constexpr int kMostHarmonics = 16;

// On CUDA 32 Gaussians are a warp's.
KNN_FN int64_t WarpsOf(int64_t P) { return (P + 31) / 32; }

// One struct serves the value and all derivatives. Operands that are not given, and results that are not asked for, are
// null. Sizes after the batch axes stand behind each array. P Gaussians.
template <class T>
struct Projection {
  Batch batch;
  Batch kept;  // of gradients in Gaussians: of size 1 along the axes over which they are summed
  int64_t P;
  int M;                   // harmonics of an array, of which (degree + 1)² count
  int degree;              // of harmonics, −1 without
  bool antialiased, dual;  // dual: whether anything moves
  Screen screen;
  T near, far, eps2d;

  Input<T> means, quats, scales;  // [P, 3], [P, 4], [P, 3]
  Input<T> covariances;           // [P, 3, 3], instead of quats and scales
  Input<T> opacities, offset;     // [P], [P, 2] or null
  Input<T> colors;                // [P, M, 3], or null without harmonics
  Input<T> camera;                // [camera_size()]
  Operand<const int32_t> usable;  // (), 0: it sees nothing

  // In full batch. With tangents, the derivatives along them; without, either y or gradients. What is not drawn is 0
  // everywhere.
  T *means2d, *conics, *opacities_out;  // [P, 2], [P, 3], [P]
  T* channels;                          // [P, 4]: red, green, blue, z; without harmonics [P]: z
  // Beside y alone, in full batch: z in float32; the radius, 0 where no tile is met; in which tiles, or null.
  float* depths;           // [P]
  int32_t *radii, *reach;  // [P], [P, 4]

  Input<T> means2d_ct, conics_ct, opacities_ct, channels_ct;  // as y, where gradients are wanted
  T *means_bar, *quats_bar, *scales_bar, *covariances_bar, *opacities_bar, *offset_bar, *colors_bar;  // in `kept`
  T* camera_bar;                                                                                      // in full batch
  T* camera_parts;  // [camera_size(), WarpsOf(P)], scratch in full batch, on CUDA alone, where camera_bar is wanted

  KNN_FN bool has_colors() const { return degree >= 0; }
  KNN_FN int camera_size() const { return has_colors() ? kCameraSizeWithCentre : kCameraSize; }
  KNN_FN int channel_count() const { return has_colors() ? 4 : 1; }
  KNN_FN bool wants_gradients() const {
    return means_bar != nullptr || quats_bar != nullptr || scales_bar != nullptr || covariances_bar != nullptr ||
           opacities_bar != nullptr || offset_bar != nullptr || colors_bar != nullptr || camera_bar != nullptr;
  }
};

}  // namespace knn

#endif  // JKA_SPLAT_PROJECT_PROJECT_H_
