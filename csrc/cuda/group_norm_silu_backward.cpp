// The gradients of GroupNorm with SiLU on CUDA: fusewire::cuda_group_norm_backward, which kernels/group_norm_silu/cuda_backward.py calls.
#include "cuda/group_norm_silu_backward.h"

#include "cuda/column_sums.h"
#include "cuda/group_norm_tensors.h"

namespace fusewire::cuda {

using Optional = std::optional<Tensor>;

// grad, x and dx [B, C, ...] have dense samples in the same memory format. The gradients of parameters are given where these are, dx where it is
// wanted. Room, all of float32: room as for cuda_group_norm; sums [B * (parts of a channel + 1 where they are several), 3, C], the totals
// last; coefficients [B, C, 8] where there is dx; products [2, B, C] where there is a weight or a bias.
static void cuda_group_norm_backward(const Tensor& grad, const Tensor& x, const Optional& weight, const Optional& bias, const Optional& shift,
                                     const Optional& scale, const Optional& add, const Optional& dx, const Optional& dweight, const Optional& dbias,
                                     const Optional& dshift, const Optional& dscale, const Optional& dadd, const Tensor& room,
                                     const Tensor& sums, const Optional& coefficients, const Optional& products, int64_t groups, double eps,
                                     bool channels_last, bool silu) {
  if (x.numel() == 0) return;
  GroupNormGradient k{};
  k.norm = group_norm_of("cuda_group_norm_backward", x, weight, bias, shift, scale, add, room, groups, eps, channels_last, silu);
  const int64_t batch = x.size(0), channels = x.size(1), rows = sums.size(0) / batch, row = row_of_picture(k.norm);
  STD_TORCH_CHECK((!dx || coefficients) && ((!dweight && !dbias) || products) && channels * GroupNormGradient::kSums < kMaxBlocks,
                  "cuda_group_norm_backward: no room for what the gradients come from");
  k.part_count = static_cast<unsigned>(rows > 1 ? rows - 1 : 1);
  k.sums = static_cast<float*>(sums.mutable_data_ptr());
  k.totals = k.sums + (rows > 1 ? batch * k.part_count * GroupNormGradient::kSums * channels : 0);
  k.grad = grad.const_data_ptr(), k.grad_batch = stride(grad, 0);
  k.vector = k.norm.vector && vectors(grad, 1, {k.grad_batch, row});
  if (dx) {
    k.dx = dx->mutable_data_ptr(), k.coefficients = static_cast<float*>(coefficients->mutable_data_ptr());
    k.vector = k.vector && vectors(*dx, 1, {row});
  }
  for (const auto& [of, place] : {std::pair{&dshift, &k.dshift}, {&dscale, &k.dscale}, {&dadd, &k.dadd}}) {
    if (*of) *place = (*of)->mutable_data_ptr();
  }
  ColumnSums totals{};
  totals.channels = static_cast<int>(channels), totals.vector = true;
  const auto over_samples = [&](const Optional& of, float*& products_of, int64_t i) {
    if (!of) return;
    products_of = static_cast<float*>(products->mutable_data_ptr()) + i * batch * channels;
    totals.vector = totals.vector && vectors(*of, 1, {channels});
    totals.add(products_of, of->mutable_data_ptr(), 1, batch);
  };
  over_samples(dweight, k.of_weight, 0);
  over_samples(dbias, k.of_bias, 1);
  const OnDevice device(x);
  check_launch("cuda_group_norm_backward", launch_group_norm_gradient(k, type_of(x), device.stream()));
  check_launch("cuda_group_norm_backward", launch_column_sums(totals, type_of(x), device.stream()));
}

}  // namespace fusewire::cuda

STABLE_TORCH_LIBRARY_IMPL(fusewire, FUSEWIRE_CUDA_KEY, m) { m.impl("cuda_group_norm_backward", TORCH_BOX(&fusewire::cuda::cuda_group_norm_backward)); }
