// What the group-norm op files share: tensors as the kernels take them.
#pragma once
#include "cuda/group_norm_silu.h"
#include "cuda/tensor.h"

namespace fusewire::cuda {

// Where a row of chunks begins in x [B, C, ...]: a group of a contiguous picture, a pixel of a channels-last one.
inline int64_t row_of_picture(const GroupNorm& k) { return k.channels_last ? k.channels : static_cast<int64_t>(k.per_group) * k.pixels; }

// x [B, C, ...] is not empty and has dense samples; room [(part_count + 1) * B * groups, 4], the parts and behind them the statistics, is float32. All but `out`.
inline GroupNorm group_norm_of(const char* name, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& shift, const std::optional<Tensor>& scale, const std::optional<Tensor>& add,
                               const Tensor& room, int64_t groups, double eps, bool channels_last, bool silu) {
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.numel() / (batch * channels);
  STD_TORCH_CHECK(x.numel() / (batch * groups) < kMaxBlocks && (!channels_last || channels * element_size(x) <= kMaxBytesLast), name, ": x is too large");
  GroupNorm k{};
  k.x = x.const_data_ptr(), k.x_batch = stride(x, 0);
  k.weight = tokens(weight), k.bias = tokens(bias), k.shift = tokens(shift), k.scale = tokens(scale), k.add = tokens(add);
  const int64_t part_count = room.size(0) / (batch * groups) - 1;
  STD_TORCH_CHECK(part_count >= 1, name, ": no room for the statistics");
  k.parts = static_cast<float*>(room.mutable_data_ptr()), k.stats = k.parts + part_count * batch * groups * 4;
  k.batch = batch, k.channels = static_cast<unsigned>(channels), k.groups = static_cast<unsigned>(groups);
  k.per_group = static_cast<unsigned>(channels / groups), k.pixels = static_cast<unsigned>(pixels), k.part_count = static_cast<unsigned>(part_count);
  k.eps = static_cast<float>(eps), k.channels_last = channels_last, k.silu = silu;
  k.vector = vectors(x, 1, {k.x_batch, row_of_picture(k)});
  return k;
}

}  // namespace fusewire::cuda
