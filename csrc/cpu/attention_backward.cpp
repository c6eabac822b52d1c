// Gradients of attention on the CPU: fusewire::attention_backward.
#include "cpu/attention_backward.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/attention_tensors.h"

namespace fusewire {

void run_attention_backward(const AttentionBackwardCall* calls, int64_t count) {
  const auto kernel = FUSEWIRE_PICK(void (*)(const AttentionBackwardCall&, const AttentionBackwardTask&), attention_backward_task);
  const auto one = [&](const AttentionBackwardCall& call, const AttentionBackwardTask& task) {
#if defined(FUSEWIRE_HAS_AMX)
    if (active_isa() == Isa::amx && amx::attention_backward_task(call, task)) return;
#endif
    kernel(call, task);
  };
  const int64_t heads = calls->heads / calls->group, each = calls->batches * heads, tasks = count * each;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(torch::stable::get_num_threads(), tasks), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) one(calls[i / each], {i % each / heads, i % heads});
  });
}

static std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const std::optional<Tensor>& lse_grad, const Tensor& q,
                                                             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& highest,
                                                             const Tensor& total, const std::optional<Tensor>& mask, bool causal,
                                                             std::optional<double> scale, const std::optional<Tensor>& blocks,
                                                             const std::optional<Tensor>& words) {
  Tensor q_grad = empty_contiguous(q), k_grad = empty_contiguous(k), v_grad = empty_contiguous(v);
  const Tensor highest_rows = torch::stable::contiguous(highest), total_rows = torch::stable::contiguous(total);
  const Tensor lse_rows = torch::stable::contiguous(lse_grad ? *lse_grad : total);
  const auto rows = [](const Tensor& x) { return static_cast<const double*>(x.const_data_ptr()); };
  AttentionBackwardCall call = attention_backward_call(q, k, v, out, grad, scale);
  call.causal = causal;
  call.highest = rows(highest_rows), call.total = rows(total_rows), call.lse_grad = lse_grad ? rows(lse_rows) : nullptr;
  call.q_grad = q_grad.data_ptr(), call.k_grad = k_grad.data_ptr(), call.v_grad = v_grad.data_ptr();
  if (mask) call.mask = attention_mask(*mask, q, k);
  call.pattern = attention_pattern(blocks, words, call.queries, call.keys);
  run_attention_backward(&call, 1);
  return {q_grad, k_grad, v_grad};
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) { m.impl("attention_backward", TORCH_BOX(&fusewire::attention_backward)); }
