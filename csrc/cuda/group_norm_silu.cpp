// GroupNorm with SiLU on CUDA: fusewire::cuda_group_norm, which kernels/group_norm_silu/cuda.py calls.
#include "cuda/group_norm_silu.h"

#include "cuda/group_norm_tensors.h"

namespace fusewire::cuda {

using Optional = std::optional<Tensor>;

// x and out [B, C, ...] have dense samples in the same memory format; room as in group_norm_tensors.h.
static void cuda_group_norm(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& shift, const Optional& scale,
                            const Optional& add, const Tensor& out, const Tensor& room, int64_t groups, double eps,
                            bool channels_last, bool silu) {
  if (x.numel() == 0) return;
  GroupNorm k = group_norm_of("cuda_group_norm", x, weight, bias, shift, scale, add, room, groups, eps, channels_last, silu);
  k.out = out.mutable_data_ptr();
  k.vector = k.vector && vectors(out, 1, {row_of_picture(k)});
  const OnDevice device(x);
  check_launch("cuda_group_norm", launch_group_norm(k, type_of(x), device.stream()));
}

}  // namespace fusewire::cuda

STABLE_TORCH_LIBRARY_IMPL(fusewire, FUSEWIRE_CUDA_KEY, m) { m.impl("cuda_group_norm", TORCH_BOX(&fusewire::cuda::cuda_group_norm)); }
