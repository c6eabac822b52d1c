// The gradients of GroupNorm with SiLU on the CPU: what group_norm_silu_backward.cpp hands to group_norm_silu_backward_kernels.cpp.
#pragma once
#include "cpu/group_norm_silu.h"

namespace fusewire {

// h = xhat * factor + offset with factor = weight * (1 + scale), offset = bias * (1 + scale) + shift; out = silu(h); dh = grad * silu'(h).
// dv = rstd * (dh * factor - mean(dh * factor) - xhat * mean(dh * factor * xhat)), the means over a group; dx = dv, and `add` gets its sums.
struct GroupNormGradientTask {
  GroupNormTask norm;   // `out` is dx, or null where it is not wanted; `stats` of [spatial, C] pictures are those of a norm without parameters
  const void* grad;     // samples dense in x's memory format
  int64_t grad_batch;
  double* sums;         // [B, kGradientSums, C]
  double* groups;       // [B, groups, kGroupValues]
  void* rows;           // [spatial, C] pictures: [B, kGradientRows, C] of the compute type
};

enum GradientSum { kOfShift, kOfFactor, kOfXhat, kGradientSums };      // sums of dh, dh * xhat and xhat over a channel's pixels
enum GroupValue { kRstd, kMean, kMeanXhat, kGroupValues };             // rstd and the two means above
// factor, offset; dx = dh * kByGrad + (v - center) * kByCentered + kConstant
enum GradientRow { kScaled, kShifted, kByGrad, kByCentered, kConstant, kGradientRows };

#define FUSEWIRE_DECLARE_GROUP_NORM_GRADIENT(T)                                                                                       \
  /* Groups [begin, end) of [C, spatial] pictures: sums, group values and dx. */                                                       \
  FUSEWIRE_DECLARE(void, group_norm_gradient_planes, (const GroupNormGradientTask&, int64_t begin, int64_t end, T))                    \
  /* [spatial, C] pictures. The rows kScaled and kShifted of sample n. */                                                              \
  FUSEWIRE_DECLARE(void, group_norm_gradient_rows, (const GroupNormGradientTask&, int64_t n, T))                                       \
  /* The sums of the blocks [begin, end) of sample n, into blocks [block, kGradientSums, C]. */                                        \
  FUSEWIRE_DECLARE(void, group_norm_gradient_sums, (const GroupNormGradientTask&, int64_t n, int64_t begin, int64_t end, void* blocks, T)) \
  /* Sums, group values and the remaining rows of sample n from its blocks. */                                                         \
  FUSEWIRE_DECLARE(void, group_norm_gradient_finish, (const GroupNormGradientTask&, int64_t n, const void* blocks, T))                 \
  /* dx for pixels [begin, end) of the B * spatial. */                                                                                 \
  FUSEWIRE_DECLARE(void, group_norm_gradient_pixels, (const GroupNormGradientTask&, int64_t begin, int64_t end, T))                    \
  /* The parameters' gradients, each null where it is not wanted: [C], [C], [B, C], [B, C], [B, C]. */                                 \
  FUSEWIRE_DECLARE(void, group_norm_parameter_gradients, (const GroupNormGradientTask&, T* weight, T* bias, T* shift, T* scale, T* add))
FUSEWIRE_DECLARE_GROUP_NORM_GRADIENT(float)
FUSEWIRE_DECLARE_GROUP_NORM_GRADIENT(double)
FUSEWIRE_DECLARE_GROUP_NORM_GRADIENT(bfloat16)
FUSEWIRE_DECLARE_GROUP_NORM_GRADIENT(float16)

}  // namespace fusewire
