// Gradients of attention on the CPU: fusewire::attention_backward.
#include "cpu/attention_backward.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/attention_tensors.h"

namespace fusewire {

static void run(const AttentionBackwardCall& call) {
  const auto kernel = FUSEWIRE_PICK_UP_TO_AVX512(void (*)(const AttentionBackwardCall&, const AttentionBackwardTask&), attention_backward_task);
  const auto one = [&](const AttentionBackwardTask& task) {
#if defined(FUSEWIRE_HAS_AMX)
    if (active_isa() == Isa::amx && amx::attention_backward_task(call, task)) return;
#endif
    kernel(call, task);
  };
  const int64_t heads = call.heads / call.group, tasks = call.batches * heads;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(torch::stable::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) one({i / heads, i % heads});
  });
}

static std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const std::optional<Tensor>& lse_grad, const Tensor& q,
                                                             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& highest,
                                                             const Tensor& total, const std::optional<Tensor>& mask, bool causal,
                                                             std::optional<double> scale) {
  STD_TORCH_CHECK(q.scalar_type() != ScalarType::Double, "attention_backward: float64 is the reference's");
  Tensor q_grad = empty_contiguous(q), k_grad = empty_contiguous(k), v_grad = empty_contiguous(v);
  const Tensor highest_rows = torch::stable::contiguous(highest), total_rows = torch::stable::contiguous(total);
  const Tensor lse_rows = torch::stable::contiguous(lse_grad ? *lse_grad : total);
  const auto rows = [](const Tensor& x) { return static_cast<const double*>(x.const_data_ptr()); };
  AttentionBackwardCall call{};
  call.q = attention_view(q), call.k = attention_view(k), call.v = attention_view(v);
  call.out = attention_view(out), call.grad = attention_view(grad);
  call.type = attention_type(q.scalar_type());
  call.batches = q.size(0), call.queries = q.size(1), call.heads = q.size(2), call.channels = q.size(3);
  call.keys = k.size(1), call.group = q.size(2) / k.size(2);
  call.scale = attention_scale(q, scale);
  call.causal = causal;
  call.highest = rows(highest_rows), call.total = rows(total_rows), call.lse_grad = lse_grad ? rows(lse_rows) : nullptr;
  call.q_grad = q_grad.data_ptr(), call.k_grad = k_grad.data_ptr(), call.v_grad = v_grad.data_ptr();
  if (mask) call.mask = attention_mask(*mask, q, k);
  run(call);
  return {q_grad, k_grad, v_grad};
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("attention_backward", TORCH_BOX(&fusewire::attention_backward)); }
