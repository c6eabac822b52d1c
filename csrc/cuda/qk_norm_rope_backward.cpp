// The gradients of QK norm on CUDA: fusewire::cuda_qk_norm_backward, which kernels/qk_norm_rope/cuda_backward.py calls.
#include "cuda/qk_norm_rope_backward.h"

#include "cuda/column_sums.h"
#include "cuda/tensor.h"

namespace fusewire::cuda {

using Optional = std::optional<Tensor>;

static QkGradientPart gradient_part(const Tensor& grad, const Tensor& x, const Optional& weight, const Optional& dx, const Optional& sums) {
  const int64_t rows = x.size(0) * x.size(1) * x.size(2);
  STD_TORCH_CHECK(rows <= kMaxBlocks, "cuda_qk_norm_backward: q or k has too many rows");
  QkGradientPart part{};
  part.grad = heads(grad), part.x = heads(x), part.weight = tokens(weight);
  part.tokens = static_cast<unsigned>(x.size(1)), part.heads = static_cast<unsigned>(x.size(2));
  if (dx) part.dx = dx->mutable_data_ptr(), part.vector = vectors(*dx, 1, {x.size(3)});
  if (sums) part.sums = static_cast<float*>(sums->mutable_data_ptr()), part.blocks = static_cast<unsigned>(sums->size(0));
  if (dx || sums) part.rows = static_cast<unsigned>(rows);
  return part;
}

static Tokens table(const Optional& t) {
  if (!t) return {};
  const int64_t token = stride(*t, 0), channel = stride(*t, 1);
  return {t->const_data_ptr(), 0, token, channel, vectors(*t, channel, {token})};
}

// The gradients are null where they are not wanted; q_sums and k_sums [blocks, D] are room for the weights' partial sums: float32.
static void cuda_qk_norm_backward(const Tensor& q_grad, const Tensor& k_grad, const Tensor& q, const Tensor& k, const Optional& q_weight,
                                  const Optional& k_weight, const Optional& cos, const Optional& sin, const Optional& dq, const Optional& dk,
                                  const Optional& dq_weight, const Optional& dk_weight, const Optional& q_sums, const Optional& k_sums, double eps) {
  STD_TORCH_CHECK(q.size(3) <= kMaxDim, "cuda_qk_norm_backward: heads are too long");
  STD_TORCH_CHECK(q_sums.has_value() == dq_weight.has_value() && k_sums.has_value() == dk_weight.has_value(), "cuda_qk_norm_backward: room for the sums");
  if (q.size(3) == 0) return;
  QkGradient n{{gradient_part(q_grad, q, q_weight, dq, q_sums), gradient_part(k_grad, k, k_weight, dk, k_sums)}, table(cos), table(sin)};
  n.dim = static_cast<int>(q.size(3)), n.eps = static_cast<float>(eps);
  ColumnSums totals{};
  totals.channels = n.dim, totals.vector = true;
  for (const auto& [of, sums] : {std::pair{&dq_weight, &q_sums}, {&dk_weight, &k_sums}}) {
    if (!*of) continue;
    totals.vector = totals.vector && vectors(**of, 1, {});
    totals.add(static_cast<const float*>((*sums)->const_data_ptr()), (*of)->mutable_data_ptr(), 1, (*sums)->size(0));
  }
  const OnDevice device(q);
  check_launch("cuda_qk_norm_backward", launch_qk_gradient(n, type_of(q), device.stream()));
  check_launch("cuda_qk_norm_backward", launch_column_sums(totals, type_of(q), device.stream()));
}

}  // namespace fusewire::cuda

STABLE_TORCH_LIBRARY_IMPL(fusewire, FUSEWIRE_CUDA_KEY, m) { m.impl("cuda_qk_norm_backward", TORCH_BOX(&fusewire::cuda::cuda_qk_norm_backward)); }
