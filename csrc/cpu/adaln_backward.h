// The gradients of adaLN on the CPU: what adaln_backward.cpp (tensors) hands to adaln_backward_kernels.cpp (loops).
#pragma once
#include "common/column_sums.h"
#include "common/isa.h"
#include "common/rows.h"
#include "common/scalar.h"

namespace fusewire {

// With r = x + gate[0] * y[0] + gate[1] * y[1], n = norm(r) * weight + bias and out[i] = n * (1 + scale[i]) + shift[i], in the rounding of `close`.
// All of one dtype. What is not wanted is null.
struct AdalnGradientTask {
  // Kinds of sums over tokens, in this order: shift and scale of each modulation, the gates, weight, bias.
  static constexpr int kMaxKinds = 8;

  int64_t batch, tokens, channels;
  int gates, modulations;       // how many of each there are: 0 to 2
  LeadingRows x, y[2];          // over [B, T, C]; x is absent where there is no modulation
  Rows gate[2], scale[2];
  Rows weight, bias;            // [C], or absent
  LeadingRows grad_residual;    // of r, where there are gates
  LeadingRows grad[2];          // of out
  double eps;
  bool rms;
  bool per_token;               // some modulation has a row for each token
  void *dx, *dy[2];             // contiguous [B, T, C]
  void* of_tokens[kMaxKinds];   // contiguous [B, T, C]: the gradient of a modulation that has a row for each token, which is no sum
  void* sums;                   // [B, blocks, kinds, C] in the compute type
  ColumnBlocks blocks{0};       // of the tokens of one sample

  int kinds() const { return 2 * modulations + gates + (weight.data || bias.data ? 2 : 0); }
};

// Blocks [begin, end) of all samples' blocks.
FUSEWIRE_DECLARE(void, adaln_gradient_blocks, (const AdalnGradientTask&, int64_t begin, int64_t end, float))
FUSEWIRE_DECLARE(void, adaln_gradient_blocks, (const AdalnGradientTask&, int64_t begin, int64_t end, double))
FUSEWIRE_DECLARE(void, adaln_gradient_blocks, (const AdalnGradientTask&, int64_t begin, int64_t end, bfloat16))
FUSEWIRE_DECLARE(void, adaln_gradient_blocks, (const AdalnGradientTask&, int64_t begin, int64_t end, float16))

}  // namespace fusewire
