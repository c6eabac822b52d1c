// QK norm with rotary embedding on CUDA: fusewire::cuda_qk_norm, which kernels/qk_norm_rope/cuda.py calls for all ops of the room.
#include "cuda/qk_norm_rope.h"

#include "cuda/tensor.h"

namespace fusewire::cuda {

static QkPart qk_part(const Tensor& x, const Tensor& out, const std::optional<Tensor>& weight, const std::optional<Tensor>& root) {
  const int64_t rows = x.size(0) * x.size(1) * x.size(2);
  STD_TORCH_CHECK(rows <= kMaxBlocks, "cuda_qk_norm: q or k has too many rows");
  return {heads(x), heads(out), tokens(weight), root ? static_cast<const float*>(root->const_data_ptr()) : nullptr, static_cast<unsigned>(rows),
          static_cast<unsigned>(x.size(1)), static_cast<unsigned>(x.size(2))};
}

// A table [T, D/2]: its first dimension is that of the tokens.
static Tokens table(const std::optional<Tensor>& t) {
  if (!t) return {};
  const int64_t token = stride(*t, 0), channel = stride(*t, 1);
  return {t->const_data_ptr(), 0, token, channel, vectors(*t, channel, {token})};
}

static void cuda_qk_norm(const Tensor& q, const Tensor& k, const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                         const std::optional<Tensor>& q_root, const std::optional<Tensor>& k_root, const Tensor& q_out, const Tensor& k_out,
                         const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, double eps, int64_t root, bool exact) {
  STD_TORCH_CHECK(q.size(3) <= kMaxDim, "cuda_qk_norm: heads are too long");
  QkNorm n{{qk_part(q, q_out, q_weight, q_root), qk_part(k, k_out, k_weight, k_root)}, table(cos), table(sin)};
  if (q.size(3) == 0 || n.part[0].rows + n.part[1].rows == 0) return;
  n.dim = static_cast<int>(q.size(3)), n.eps = static_cast<float>(eps), n.root = static_cast<Root>(root), n.exact = exact;
  const OnDevice device(q);
  check_launch("cuda_qk_norm", launch_qk_norm(n, type_of(q), device.stream()));
}

}  // namespace fusewire::cuda

STABLE_TORCH_LIBRARY_IMPL(fusewire, FUSEWIRE_CUDA_KEY, m) { m.impl("cuda_qk_norm", TORCH_BOX(&fusewire::cuda::cuda_qk_norm)); }
