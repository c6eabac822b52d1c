// GroupNorm with SiLU on the CPU: what group_norm_silu*.cpp (tensors) hand to the *_kernels.cpp (loops).
#pragma once
#include "common/isa.h"
#include "common/rows.h"
#include "common/scalar.h"
#include "common/stock_order.h"

namespace fusewire {

// What [spatial, C] pictures need in `stats`: for each sample, the rows of C coefficients that normalise it. Of the compute type.
enum GroupNormRow { kCenter, kFactor, kOffset, kShift, kAdd, kGroupNormRows };
// Pixels whose sums are kept apart before they are added in float64.
inline constexpr int64_t kPixelBlock = 128;

// v = x + add; y = (v - mean) * rstd * weight + bias over each of `groups` groups of channels; out = silu(y * (1 + scale) + shift). One dtype.
struct GroupNormTask {
  int64_t batch, channels, spatial, groups;
  bool channels_last;     // a sample is dense as [spatial, C]; otherwise as [C, spatial]
  const void* x;
  int64_t x_batch;        // elements from sample to sample
  void* out;              // dense, in x's memory format
  Rows weight, bias;      // [C], or absent (data null)
  Rows shift, scale, add; // [B, C], or absent
  double eps;
  bool silu, exact;
  StockOrder order;       // exact: how PyTorch sums
  bool fused_offset;      // exact, channels-last: whether PyTorch fuses -mean * factor + bias
  int64_t silu_step;      // exact: PyTorch's silu takes this many elements at a time and the rest one by one; 0: all one by one
  int64_t silu_chunk;     // exact: elements of the output that one of its threads takes
  void* stats;            // see each kernel

  int64_t group_channels() const { return channels / groups; }
  int64_t sample() const { return channels * spatial; }
  int64_t blocks() const { return (spatial + kPixelBlock - 1) / kPixelBlock; }
};

#define FUSEWIRE_DECLARE_GROUP_NORM(T)                                                                                             \
  /* Groups [begin, end) of the B * groups of a [C, spatial] picture, from x to out. */                                             \
  FUSEWIRE_DECLARE(void, group_norm_planes, (const GroupNormTask&, int64_t begin, int64_t end, T))                                  \
  /* [spatial, C] pictures. The `add` row of sample n, and for close into `center` a guess of every group's mean. */                \
  FUSEWIRE_DECLARE(void, group_norm_guess, (const GroupNormTask&, int64_t n, T))                                                    \
  /* For each of the blocks [begin, end) of sample n: the sums over its pixels of v - center and of its square, into sums [block, 2, C]. */ \
  FUSEWIRE_DECLARE(void, group_norm_block_sums, (const GroupNormTask&, int64_t n, int64_t begin, int64_t end, void* sums, T))       \
  /* The coefficients of sample n from these sums. False: a center was too far off, take the sums again around the new ones. */     \
  FUSEWIRE_DECLARE(bool, group_norm_finish, (const GroupNormTask&, int64_t n, const void* sums, bool again, T))                     \
  /* exact: as group_norm_planes and group_norm_pixels. */                                                                          \
  FUSEWIRE_DECLARE(void, group_norm_exact_planes, (const GroupNormTask&, int64_t begin, int64_t end, T))                            \
  FUSEWIRE_DECLARE(void, group_norm_exact_pixels, (const GroupNormTask&, int64_t begin, int64_t end, T))                            \
  /* [spatial, C] pictures, exact. out = x + add for pixels [begin, end) of the B * spatial. */                                     \
  FUSEWIRE_DECLARE(void, group_norm_add, (const GroupNormTask&, int64_t begin, int64_t end, T))                                     \
  /* The coefficients of groups [begin, end), by the sums that PyTorch takes of small pictures. */                                  \
  FUSEWIRE_DECLARE(void, group_norm_small, (const GroupNormTask&, int64_t begin, int64_t end, T))                                   \
  /* Adds pixels [begin, end) to one thread's sums [B, 2, C], as PyTorch does for large pictures. */                                \
  FUSEWIRE_DECLARE(void, group_norm_thread_sums, (const GroupNormTask&, int64_t begin, int64_t end, void* sums, T))                 \
  /* The coefficients of every group from the sums [threads, B, 2, C]. */                                                           \
  FUSEWIRE_DECLARE(void, group_norm_large, (const GroupNormTask&, const void* sums, int64_t threads, T))                            \
  /* Pixels [begin, end) from x to out by the coefficients. */                                                                      \
  FUSEWIRE_DECLARE(void, group_norm_pixels, (const GroupNormTask&, int64_t begin, int64_t end, T))
FUSEWIRE_DECLARE_GROUP_NORM(float)
FUSEWIRE_DECLARE_GROUP_NORM(double)
FUSEWIRE_DECLARE_GROUP_NORM(bfloat16)
FUSEWIRE_DECLARE_GROUP_NORM(float16)

}  // namespace fusewire
