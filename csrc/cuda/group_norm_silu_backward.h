// The gradients of GroupNorm with SiLU on CUDA: what group_norm_silu_backward.cpp (tensors) hands to group_norm_silu_backward_kernels.cu (device code).
#pragma once
#include "cuda/group_norm_silu.h"

namespace fusewire::cuda {

// Of out = silu(h), h = xhat * factor + offset with factor = weight * (1 + scale), offset = bias * (1 + scale) + shift, in the rounding of `close`.
// With d, the distance of x + add from its group's mean as a float, and dh = grad * silu'(h):
// dx = rstd * (dh * factor - mean(dh * factor) - xhat * mean(dh * factor * xhat)), the means over a group; `add` gets the sums of dx over pixels.
struct GroupNormGradient {
  static constexpr int kSums = 3, kCoefficients = 8;

  GroupNorm norm;           // `out` is null
  const void* grad;         // samples dense in x's memory format
  int64_t grad_batch;       // from sample to sample
  void* dx;                 // dense, in the same format; null where it is not wanted
  void *dshift, *dscale, *dadd;  // contiguous [B, C], each null where there is no such parameter
  float* sums;              // [B, part_count, kSums, C]: of dh, of dh * d and of d, over a part of a channel's pixels
  float* totals;            // [B, kSums, C]: over all of them; `sums` itself where there is one part
  float* coefficients;      // [B, C, kCoefficients]: add, center, rstd * factor and offset of h, then a, b: dx = dh * rstd * factor + d * a + b
  float *of_weight, *of_bias;  // [B, C]: a sample's part in the gradients of weight and bias, each null where there is none
  unsigned part_count;
  bool vector;              // whole chunks of x, of grad and of dx start on 16 bytes
};

// nullptr, or what went wrong. Statistics, sums, what follows from their totals, dx.
const char* launch_group_norm_gradient(const GroupNormGradient& task, Type type, void* stream);

}  // namespace fusewire::cuda
