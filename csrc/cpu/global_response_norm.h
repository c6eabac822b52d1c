// Global response normalisation on the CPU: what global_response_norm.cpp (tensors) hands to global_response_norm_kernels.cpp (loops).
#pragma once
#include "common/column_sums.h"
#include "common/isa.h"
#include "common/rows.h"
#include "common/scalar.h"

namespace fusewire {

// Over the rows of each sample of x [B, H, W, C], where g = |x| by channel, n = g / (mean(g) + eps):
//   out = x * (1 + weight * n) + bias, or where there is `grad`, the gradient of x for it.
// In three passes: sums over blocks of a sample's rows, what a sample multiplies its rows by, the rows.
struct ResponseTask {
  LeadingRows x, grad;  // grad.data is null forwards
  int64_t samples, channels;
  ColumnBlocks blocks;  // of one sample's rows
  const void *weight, *bias;
  int64_t weight_stride, bias_stride;
  double eps;
  void* sums;     // [B, blocks, kinds, C] in the compute type: of x^2; backwards also of grad * x and of grad
  // [B, factors, C] in the compute type: of x, or of grad; backwards also of x, and the sample's parts of the gradients of weight and bias
  void* factors;
  void* out;      // contiguous; null where the gradient of x is not wanted

  int kinds() const { return grad.data ? 3 : 1; }
  int factor_kinds() const { return grad.data ? 4 : 1; }
};

#define FUSEWIRE_DECLARE_RESPONSE(T)                                                              \
  FUSEWIRE_DECLARE(void, response_blocks, (const ResponseTask&, int64_t begin, int64_t end, T))   \
  FUSEWIRE_DECLARE(void, response_samples, (const ResponseTask&, int64_t begin, int64_t end, T))  \
  FUSEWIRE_DECLARE(void, response_rows, (const ResponseTask&, int64_t begin, int64_t end, T))
FUSEWIRE_DECLARE_RESPONSE(float)
FUSEWIRE_DECLARE_RESPONSE(double)
FUSEWIRE_DECLARE_RESPONSE(bfloat16)
FUSEWIRE_DECLARE_RESPONSE(float16)

}  // namespace fusewire
