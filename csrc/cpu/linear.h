// Linear layers on the CPU: what linear.cpp (tensors, threads) hands to linear_kernels.cpp (tiles).
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "common/scalar.h"

namespace fusewire {

enum class Activation : int { none, gelu_tanh, silu };

// The rows of a tensor [..., C] of any strides (in elements). Leading dimensions that the tensor broadcasts over have stride 0.
struct LeadingRows {
  static constexpr int kMaxDims = 8;
  const void* data;
  int dims;  // leading dimensions
  int64_t sizes[kMaxDims], strides[kMaxDims];
  int64_t channel;
  int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return dims ? at + row * strides[0] : 0;
  }
};

// out = act(x @ weight.T + bias), or residual + gate * (x @ weight.T + bias). All tensors have one dtype; out [rows, n] is contiguous.
struct LinearCall {
  LeadingRows x;
  const void* weight;
  int64_t weight_row, weight_col;
  const void* bias;  // may be null
  int64_t bias_stride;
  Activation activation;
  LeadingRows gate, residual;  // data may be null
  void* out;
  int64_t rows, inputs, outputs;
};

// The part of the output that one task computes. Results do not depend on how the output is cut.
struct LinearBlock { int64_t row, rows, col, cols; };

constexpr int64_t kLinearRows = 1008, kLinearCols = 256;  // the largest block
constexpr int64_t kLinearPacked = 1 << 20;                // floats of packed weight that one thread may hold, where a panel is not more

FUSEWIRE_DECLARE(int64_t, linear_panel, ())    // a block's columns should be a multiple of it
FUSEWIRE_DECLARE(int64_t, linear_scratch, (int64_t inputs, int64_t cols))  // floats that linear_block needs, 64-byte aligned
FUSEWIRE_DECLARE(void, linear_block, (const LinearCall&, const LinearBlock&, float* scratch, float))
FUSEWIRE_DECLARE(void, linear_block, (const LinearCall&, const LinearBlock&, float* scratch, bfloat16))
FUSEWIRE_DECLARE(void, linear_block, (const LinearCall&, const LinearBlock&, float* scratch, float16))

}  // namespace fusewire
