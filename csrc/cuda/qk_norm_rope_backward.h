// The gradients of QK norm on CUDA: what qk_norm_rope_backward.cpp (tensors) hands to qk_norm_rope_backward_kernels.cu (device code).
#pragma once
#include "cuda/qk_norm_rope.h"

namespace fusewire::cuda {

// Rows (b, t, h) of q or of k; no rows where neither gradient is wanted.
struct QkGradientPart {
  Heads grad, x;
  Tokens weight;    // [D], or absent
  void* dx;         // contiguous [B, T, H, D], or null
  float* sums;      // [blocks, D], of the gradient of the weight, or null
  unsigned rows, tokens, heads;
  unsigned blocks, steps;  // a block takes `steps` rows for each of its threads' rows
  bool vector;      // dx's rows can be written 16 bytes at a time
};

// Of out = rotate(x / sqrt(mean(x^2) + eps) * weight), in the rounding of `close`. All of one dtype, but for the tables.
struct QkGradient {
  QkGradientPart part[2];
  Tokens cos, sin;  // [T, D/2] float32, or absent
  int dim;
  float eps;
};

// nullptr, or what went wrong. A part with `sums` says how many blocks it has; the others get as many as they have tiles.
const char* launch_qk_gradient(QkGradient task, Type type, void* stream);

}  // namespace fusewire::cuda
