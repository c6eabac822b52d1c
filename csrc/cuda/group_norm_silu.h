// GroupNorm with SiLU on CUDA: what group_norm_silu.cpp (tensors) hands to group_norm_silu_kernels.cu and group_norm_stats_kernels.cu (device code).
#pragma once
#include "cuda/views.h"

namespace fusewire::cuda {

// out = silu(group_norm(x + add) * (1 + scale) + shift) for x [B, C, pixels], whose samples are dense: [C, pixels], or [pixels, C] (`channels_last`).
struct GroupNorm {
  const void* x;
  int64_t x_batch;  // from sample to sample
  void* out;        // dense, in the same format
  Tokens weight, bias, shift, scale, add;  // over samples and channels; [C] alike for all samples; or absent
  float* parts;     // [B, groups, part_count, 4]: a part's count, mean and centred squares; the mean from the group's first value
  float* stats;     // [B, groups, 4]: the mean, what is to be added to a distance from it as it is no float; 1 / sqrt(variance + eps)
  int64_t batch;
  unsigned channels, groups, per_group, pixels, part_count;
  float eps;
  bool channels_last, silu;
  bool vector;  // whole chunks of x and of out start on 16 bytes
  unsigned repeat;  // of what a block has of a channels-last picture; set where the kernel is launched
};

constexpr int kMaxBytesLast = 8192;  // a block of 512 threads holds all channels of a pixel

// All: nullptr, or what went wrong. The first writes `parts` alone, the second `parts` and `stats`, the third `out`, `parts` and perhaps `stats`.
const char* launch_group_norm_parts(const GroupNorm& task, Type type, void* stream);
const char* launch_group_norm_stats(const GroupNorm& task, Type type, void* stream);
const char* launch_group_norm(const GroupNorm& task, Type type, void* stream);

}  // namespace fusewire::cuda
