// The gradients of QK norm with rotary embedding on the CPU: fusewire::qk_norm_rope_backward.
#include "cpu/qk_norm_rope_backward.h"

#include "common/column_totals.h"
#include "common/empty.h"

namespace fusewire {

using Optional = std::optional<Tensor>;

// The gradients of one of q and k, and of its weight; one that is not wanted has no elements.
static std::tuple<Tensor, Tensor> gradients(const Tensor& grad, const Tensor& x, const Optional& weight, const Optional& cos, const Optional& sin,
                                            double eps, bool of_x, bool of_weight) {
  const int64_t dim = x.size(3), heads = x.size(0) * x.size(1) * x.size(2);
  const Tensor dx = of_x ? empty_contiguous(x) : empty_vector(0, x);
  QkGradientTask k{};
  k.grad = leading_rows(grad, grad), k.x = leading_rows(x, x);
  k.tokens = x.size(1), k.heads = x.size(2), k.dim = dim, k.eps = eps, k.blocks = ColumnBlocks(heads);
  if (weight) k.weight = weight->const_data_ptr(), k.weight_stride = weight->stride(0);
  if (cos) {
    k.cos = static_cast<const float*>(cos->const_data_ptr()), k.sin = static_cast<const float*>(sin->const_data_ptr());
    for (int i = 0; i < 2; ++i) k.cos_stride[i] = cos->stride(i), k.sin_stride[i] = sin->stride(i);
  }
  if (of_x) k.dx = dx.mutable_data_ptr();
  const ColumnSums sums(of_weight ? k.blocks.count : 0, 1, dim, x);
  if (of_weight) k.sums = sums.data();
  if (dim && (of_x || of_weight)) {
    FUSEWIRE_SWITCH_FLOATS(x.scalar_type(), "qk_norm_rope gradient", {
      const auto run = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const QkGradientTask&, int64_t, int64_t, scalar_t), qk_gradient_blocks);
      const int64_t grain = 1 + 16384 / (1 + dim * k.blocks.height);
      torch::stable::parallel_for(0, k.blocks.count, grain, [&](int64_t begin, int64_t end) { run(k, begin, end, scalar_t{}); });
    });
  }
  return {dx, of_weight ? sums.total(0) : empty_vector(0, x)};
}

// Bit i of `wanted` asks for the i-th of the gradients of q, k, q_weight, k_weight.
static std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(const Tensor& q_grad, const Tensor& k_grad, const Tensor& q, const Tensor& k,
                                                                        const Optional& q_weight, const Optional& k_weight, const Optional& cos,
                                                                        const Optional& sin, double eps, int64_t wanted) {
  const auto [dq, dq_weight] = gradients(q_grad, q, q_weight, cos, sin, eps, wanted & 1, q_weight && wanted & 4);
  const auto [dk, dk_weight] = gradients(k_grad, k, k_weight, cos, sin, eps, wanted & 2, k_weight && wanted & 8);
  return {dq, dk, dq_weight, dk_weight};
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("qk_norm_rope_backward", TORCH_BOX(&fusewire::qk_norm_rope_backward)); }
