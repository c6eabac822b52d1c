// QK norm with rotary embedding on CUDA: what qk_norm_rope.cpp (tensors) hands to qk_norm_rope_kernels.cu (device code).
#pragma once
#include "cuda/views.h"

namespace fusewire::cuda {

enum class Root : int { none, given, computed };  // 1 / sqrt(mean(x^2) + eps): not applied, read, computed

// Rows (b, t, h) of q or of k.
struct QkPart {
  Heads x, out;
  Tokens weight;      // [D], or absent
  const float* root;  // [B, T, H], where it is given
  unsigned rows, tokens, heads;
};

// out = rotate(x * root * weight), rotated where there is a table; `exact` rounds where the stock modules round. All of one dtype, but for the tables.
struct QkNorm {
  QkPart part[2];
  Tokens cos, sin;  // [T, D/2] float32, or absent
  unsigned q_blocks;  // set by the launch: q's blocks come before k's
  int dim;
  float eps;
  Root root;
  bool exact;
};

constexpr int kMaxDim = 1024;  // a head's row is held in the registers of one warp

// nullptr, or what went wrong.
const char* launch_qk_norm(QkNorm task, Type type, void* stream);

}  // namespace fusewire::cuda
