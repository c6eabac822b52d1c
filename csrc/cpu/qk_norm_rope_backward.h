// The gradients of QK norm with rotary embedding: what qk_norm_rope_backward.cpp (tensors) hands to qk_norm_rope_backward_kernels.cpp (loops).
#pragma once
#include "common/column_sums.h"
#include "common/isa.h"
#include "common/rows.h"
#include "common/scalar.h"

namespace fusewire {

// The gradients of q or of k [B, T, H, D] and of its weight, in the rounding of `close`. What is not wanted is null.
struct QkGradientTask {
  LeadingRows grad, x;
  int64_t tokens, heads, dim;
  const void* weight;  // may be null
  int64_t weight_stride;
  const float *cos, *sin;  // [T, D/2]; null: no rotation
  int64_t cos_stride[2], sin_stride[2];
  double eps;
  void* dx;    // contiguous
  void* sums;  // [blocks, D] in the compute type
  ColumnBlocks blocks{0};  // of the B * T * H heads
};

FUSEWIRE_DECLARE(void, qk_gradient_blocks, (const QkGradientTask&, int64_t begin, int64_t end, float))
FUSEWIRE_DECLARE(void, qk_gradient_blocks, (const QkGradientTask&, int64_t begin, int64_t end, double))
FUSEWIRE_DECLARE(void, qk_gradient_blocks, (const QkGradientTask&, int64_t begin, int64_t end, bfloat16))
FUSEWIRE_DECLARE(void, qk_gradient_blocks, (const QkGradientTask&, int64_t begin, int64_t end, float16))

}  // namespace fusewire
