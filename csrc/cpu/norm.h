// RMSNorm and LayerNorm on the CPU: what norm.cpp (tensors) hands to norm_*kernels.cpp (loops).
#pragma once
#include "common/column_sums.h"
#include "common/isa.h"
#include "common/rows.h"
#include "common/scalar.h"
#include "common/stock_order.h"

namespace fusewire {

// Which norm, and whose rounding it follows. `wide`: on the row converted to float. `torch`, `diffusers`: as the module of that name.
enum class NormKind : int { layer_close, layer_torch, layer_wide, rms_close, rms_torch, rms_diffusers };

// A vector [C] of the rows' dtype, or of float where `wide`; or absent (data null).
struct Affine {
  const void* data = nullptr;
  int64_t stride = 0;
  bool wide = false;
};

// out = norm(x) * weight + bias over the channels.
struct NormTask {
  LeadingRows x, out;
  int64_t channels;
  Affine weight, bias;
  double eps;
  NormKind kind;
  StockOrder order;  // for layer_torch and layer_wide
};

inline constexpr int kPictureBytes = 128;  // of each channel that are read at a time: a tile of all channels of so many pixels is normalised together

// LayerNorm over the channels of pictures [B, C, pixels] whose pixels lie side by side; `begin` and `end` count tiles. out: contiguous.
struct PictureNormTask {
  const void* x;
  int64_t x_batch, x_channel;  // strides
  void* out;
  int64_t pixels, channels;
  Affine weight, bias;
  double eps;
  bool exact;
  StockOrder order;  // where it is exact
};

// The gradients of a norm in the rounding of `close`. `dx` and `sums` may be null where they are not wanted.
struct NormGradientTask {
  LeadingRows grad, x;
  int64_t channels;
  Affine weight;
  double eps;
  bool rms;
  void* dx;    // contiguous
  void* sums;  // [blocks, 2, C] in the compute type: of grad * xhat, and of grad
  ColumnBlocks blocks;
};

// Tiles of pictures in blocks, each of which has its own sums: by their number alone.
struct TileBlocks {
  static constexpr int64_t kLeast = 4, kBlocks = 64;
  int64_t tiles, height, count;

  explicit TileBlocks(int64_t n) : tiles(n), height(kLeast * kBlocks < n ? (n + kBlocks - 1) / kBlocks : kLeast), count((n + height - 1) / height) {}
  int64_t begin(int64_t block) const { return block * height; }
  int64_t end(int64_t block) const { return tiles < (block + 1) * height ? tiles : (block + 1) * height; }
};

// As NormGradientTask, of the pictures of a PictureNormTask. dx: contiguous.
struct PictureGradientTask {
  const void *x, *grad;
  int64_t x_batch, x_channel, grad_batch, grad_channel, pixels, channels;
  Affine weight;
  double eps;
  void *dx, *sums;
  TileBlocks blocks;
};

#define FUSEWIRE_DECLARE_NORM(T)                                                                 \
  FUSEWIRE_DECLARE(void, norm_rows, (const NormTask&, int64_t begin, int64_t end, T))            \
  FUSEWIRE_DECLARE(void, norm_pictures, (const PictureNormTask&, int64_t begin, int64_t end, T)) \
  FUSEWIRE_DECLARE(void, norm_gradient_blocks, (const NormGradientTask&, int64_t begin, int64_t end, T)) \
  FUSEWIRE_DECLARE(void, norm_picture_gradients, (const PictureGradientTask&, int64_t begin, int64_t end, T))
FUSEWIRE_DECLARE_NORM(float)
FUSEWIRE_DECLARE_NORM(double)
FUSEWIRE_DECLARE_NORM(bfloat16)
FUSEWIRE_DECLARE_NORM(float16)

}  // namespace fusewire
