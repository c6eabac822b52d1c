// QK norm with rotary embedding on the CPU: what qk_norm_rope.cpp (tensors) hands to qk_norm_rope_kernels.cpp (loops).
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace fusewire {

// q or k: [B, T, H, D] in, [B, T, H, D] out. Strides are in elements, in that order.
struct QkTensor {
  const void* x;
  int64_t x_stride[4];
  void* out;
  int64_t out_stride[4];
  const void* weight;  // may be null
  int64_t weight_stride;
  int64_t tokens, heads;
  bool streams;  // out is written past the caches: it starts on 64 bytes, and so does each head
};

struct QkNorm {
  int64_t dim;
  const float* cos;  // [T, D/2]; null: no rotation
  const float* sin;
  int64_t cos_stride[2], sin_stride[2];
  double eps;
  int64_t norm;  // as reference.py numbers them
  bool exact;
};

enum QkNormCode : int64_t { kRms, kTorchRms, kRotation, kHalvesRotation };  // the last two: no norm; pairs (x[2i], x[2i+1]), or (x[i], x[i + D/2])

// Normalises (and rotates) the tokens begin..end of the B * T tokens of one tensor.
#define FUSEWIRE_QK_NORM_ARGS(T) (const QkNorm&, const QkTensor&, int64_t begin, int64_t end, T)
FUSEWIRE_DECLARE(void, qk_norm_tokens, FUSEWIRE_QK_NORM_ARGS(float))
FUSEWIRE_DECLARE(void, qk_norm_tokens, FUSEWIRE_QK_NORM_ARGS(double))
FUSEWIRE_DECLARE(void, qk_norm_tokens, FUSEWIRE_QK_NORM_ARGS(bfloat16))
FUSEWIRE_DECLARE(void, qk_norm_tokens, FUSEWIRE_QK_NORM_ARGS(float16))

}  // namespace fusewire
