// GroupNorm with SiLU on CUDA: fusewire::cuda_group_norm, which kernels/group_norm_silu/cuda.py calls.
#include "cuda/group_norm_silu.h"

#include "cuda/tensor.h"

namespace fusewire::cuda {

// x and out [B, C, ...] have dense samples in the same memory format; parts [B * groups, part_count, 4] and stats [B * groups, 4] are float32.
static void cuda_group_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& shift,
                            const std::optional<Tensor>& scale, const std::optional<Tensor>& add, const Tensor& out, const Tensor& parts,
                            const Tensor& stats, int64_t groups, double eps, bool channels_last, bool silu) {
  if (x.numel() == 0) return;
  const int64_t batch = x.size(0), channels = x.size(1), pixels = x.numel() / (batch * channels), parted = parts.size(1);
  STD_TORCH_CHECK(x.numel() / (batch * groups) < kMaxBlocks && (!channels_last || channels * element_size(x) <= kMaxBytesLast),
                  "cuda_group_norm: x is too large");
  GroupNorm k{};
  k.x = x.const_data_ptr(), k.x_batch = stride(x, 0), k.out = out.mutable_data_ptr();
  k.weight = tokens(weight), k.bias = tokens(bias), k.shift = tokens(shift), k.scale = tokens(scale), k.add = tokens(add);
  k.parts = static_cast<float*>(parts.mutable_data_ptr()), k.stats = static_cast<float*>(stats.mutable_data_ptr());
  k.batch = batch, k.channels = static_cast<unsigned>(channels), k.groups = static_cast<unsigned>(groups);
  k.per_group = static_cast<unsigned>(channels / groups), k.pixels = static_cast<unsigned>(pixels), k.part_count = static_cast<unsigned>(parted);
  k.eps = static_cast<float>(eps), k.channels_last = channels_last, k.silu = silu;
  // Where a row of chunks begins: a group of a contiguous picture, a pixel of a channels-last one
  const int64_t row = channels_last ? channels : channels / groups * pixels;
  k.vector = vectors(x, 1, {k.x_batch, row}) && vectors(out, 1, {row});
  const OnDevice device(x);
  check_launch("cuda_group_norm", launch_group_norm(k, type_of(x), device.stream()));
}

}  // namespace fusewire::cuda

STABLE_TORCH_LIBRARY_IMPL(fusewire, FUSEWIRE_CUDA_KEY, m) { m.impl("cuda_group_norm", TORCH_BOX(&fusewire::cuda::cuda_group_norm)); }
