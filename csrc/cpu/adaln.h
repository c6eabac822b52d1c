// adaLN on the CPU: what adaln.cpp (tensors) hands to adaln_kernels.cpp (loops).
#pragma once
#include "common/isa.h"
#include "common/rows.h"
#include "common/scalar.h"
#include "common/stock_order.h"

namespace fusewire {

// r = x + gate * y + gate2 * y2; out[i] = norm(r) * (1 + scale[i]) + shift[i]. All of one dtype.
struct AdalnTask {
  int64_t batch, tokens, channels;
  Rows x, y, gate, y2, gate2;  // y and y2 may be absent (data null), and their gates with them
  Rows shift[2], scale[2];
  int modulations;             // 0: only r is wanted
  Rows weight, bias;           // the norm's [C], or absent
  void* residual;              // r, contiguous [B, T, C]; null where there is no y
  void* out[2];                // contiguous [B, T, C]
  double eps;
  bool rms, exact;
  bool asks_ahead;             // for the rows that follow, while these are computed
  bool streams;                // outputs are written past the caches: they start on 64 bytes, and so do their rows
  StockOrder order;            // for exact LayerNorm
};

// Rows [begin, end) of the B * T rows.
FUSEWIRE_DECLARE(void, adaln_rows, (const AdalnTask&, int64_t begin, int64_t end, float))
FUSEWIRE_DECLARE(void, adaln_rows, (const AdalnTask&, int64_t begin, int64_t end, double))
FUSEWIRE_DECLARE(void, adaln_rows, (const AdalnTask&, int64_t begin, int64_t end, bfloat16))
FUSEWIRE_DECLARE(void, adaln_rows, (const AdalnTask&, int64_t begin, int64_t end, float16))

// The mean and 1 / sqrt(variance + eps) of each row of x [rows, channels] in PyTorch's order, into out [rows, 2].
FUSEWIRE_DECLARE(void, layer_norm_moments, (const float* x, int64_t rows, int64_t channels, double eps, StockOrder, float* out))
FUSEWIRE_DECLARE(void, layer_norm_moments, (const double* x, int64_t rows, int64_t channels, double eps, StockOrder, double* out))
FUSEWIRE_DECLARE(void, layer_norm_moments, (const bfloat16* x, int64_t rows, int64_t channels, double eps, StockOrder, float* out))
FUSEWIRE_DECLARE(void, layer_norm_moments, (const float16* x, int64_t rows, int64_t channels, double eps, StockOrder, float* out))

}  // namespace fusewire
