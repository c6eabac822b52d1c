// Gated activations on the CPU: what gated_mlp.cpp (tensors) hands to gated_mlp_kernels.cpp (loops).
#pragma once
#include "common/column_sums.h"
#include "common/isa.h"
#include "common/rows.h"
#include "common/scalar.h"

namespace fusewire {

enum class GatedActivation : int { gelu_erf, silu, quick_gelu, gelu_tanh };

// A half of the bias [2 F], of the rows' dtype; or absent (data null).
struct BiasHalf {
  const void* data = nullptr;
  int64_t stride = 0;
};

// out = (hidden + hidden_bias) * act(gate + gate_bias); without a hidden (data null) act(gate + gate_bias) alone.
struct GatedTask {
  LeadingRows hidden, gate;
  BiasHalf hidden_bias, gate_bias;
  GatedActivation activation;
  int64_t width;  // F
  void* out;      // contiguous [rows, F]
};

// The gradients: dhidden = grad * act(gate), dgate = grad * hidden * act'(gate).
struct GatedGradientTask {
  GatedTask forward;  // out is unused
  LeadingRows grad;
  void *dhidden, *dgate;      // [rows, F], rows `stride` elements apart; dhidden is null without a hidden
  int64_t stride;
  void* sums;                 // [blocks, 2 F] in the compute type (without a hidden [blocks, F]): dhidden and dgate added up, at the columns below; or null
  int64_t hidden_at, gate_at;
  ColumnBlocks blocks;
};

#define FUSEWIRE_DECLARE_GATED(T)                                                        \
  FUSEWIRE_DECLARE(void, gated_rows, (const GatedTask&, int64_t begin, int64_t end, T))  \
  FUSEWIRE_DECLARE(void, gated_gradient_blocks, (const GatedGradientTask&, int64_t begin, int64_t end, T))
FUSEWIRE_DECLARE_GATED(float)
FUSEWIRE_DECLARE_GATED(double)
FUSEWIRE_DECLARE_GATED(bfloat16)
FUSEWIRE_DECLARE_GATED(float16)

}  // namespace fusewire
