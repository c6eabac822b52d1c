// Attention over sequences of different lengths, packed one after another: fusewire::attention_varlen and its gradients.
//
// Every sequence is a call of its own into the kernels of attention.cpp and attention_backward.cpp, on the packed tensors where they lie: what it
// gives does not depend on the others.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/attention_tensors.h"

namespace fusewire {

// The first tokens of the sequences, and the end of the last one.
static std::vector<int64_t> boundaries(const Tensor& cu_seqlens, int64_t total, const char* name) {
  const int32_t* p = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  std::vector<int64_t> found(cu_seqlens.size(0));
  for (size_t i = 0; i < found.size(); ++i) found[i] = p[static_cast<int64_t>(i) * cu_seqlens.stride(0)];
  STD_TORCH_CHECK(!found.empty() && found[0] == 0 && std::is_sorted(found.begin(), found.end()) && found.back() == total, name,
                  " should begin with 0, never decrease, and end with ", total, ", the number of tokens");
  return found;
}

struct Sequence { int64_t query, queries, key, keys; };

static std::vector<Sequence> sequences_of(const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k) {
  const std::vector<int64_t> queries = boundaries(cu_seqlens_q, q.size(0), "cu_seqlens_q"), keys = boundaries(cu_seqlens_k, k.size(0), "cu_seqlens_k");
  STD_TORCH_CHECK(queries.size() == keys.size(), "cu_seqlens_q and cu_seqlens_k should have one length");
  std::vector<Sequence> found;
  for (size_t i = 0; i + 1 < queries.size(); ++i) found.push_back({queries[i], queries[i + 1] - queries[i], keys[i], keys[i + 1] - keys[i]});
  return found;
}

// The tokens from `first` on.
static AttentionTensor part(AttentionTensor x, int64_t first, int64_t tokens, int64_t bytes) {
  x.data = static_cast<const char*>(x.data) + first * x.token * bytes;
  x.tokens = tokens;
  return x;
}

static void run(AttentionCall whole, const Tensor& q, const Tensor& k, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, bool causal) {
  const int64_t bytes = element_size(q);
  whole.causal = causal;
  std::vector<AttentionCall> calls;
  for (const Sequence& one : sequences_of(q, k, cu_seqlens_q, cu_seqlens_k)) {
    AttentionCall call = whole;
    call.queries = one.queries, call.keys = one.keys;
    call.q[0] = part(whole.q[0], one.query, one.queries, bytes), call.out[0] = part(whole.out[0], one.query, one.queries, bytes);
    call.k[0] = part(whole.k[0], one.key, one.keys, bytes), call.v[0] = part(whole.v[0], one.key, one.keys, bytes);
    if (whole.total) call.highest = whole.highest + one.query, call.total = whole.total + one.query;
    calls.push_back(call);
  }
  run_attention(calls.data(), static_cast<int64_t>(calls.size()), 1);
}

static Tensor attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, bool causal,
                               std::optional<double> scale) {
  Tensor out = empty_contiguous(q);
  run(attention_call(q, k, v, out, scale, 1.0), q, k, cu_seqlens_q, cu_seqlens_k, causal);
  return out;
}

static std::tuple<Tensor, Tensor, Tensor> attention_varlen_softmax(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                                                   const Tensor& cu_seqlens_k, bool causal, std::optional<double> scale) {
  Tensor out = empty_contiguous(q);
  Tensor highest = torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Double);
  Tensor total = torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Double);
  AttentionCall call = attention_call(q, k, v, out, scale, 1.0);
  call.highest = static_cast<double*>(highest.data_ptr());
  call.total = static_cast<double*>(total.data_ptr());
  run(call, q, k, cu_seqlens_q, cu_seqlens_k, causal);
  return {out, highest, total};
}

static std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(const Tensor& grad, const std::optional<Tensor>& lse_grad, const Tensor& q,
                                                                    const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& highest,
                                                                    const Tensor& total, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                                    bool causal, std::optional<double> scale) {
  Tensor q_grad = empty_contiguous(q), k_grad = empty_contiguous(k), v_grad = empty_contiguous(v);
  const Tensor highest_rows = torch::stable::contiguous(highest), total_rows = torch::stable::contiguous(total);
  const Tensor lse_rows = torch::stable::contiguous(lse_grad ? *lse_grad : total);
  const auto rows = [](const Tensor& x, int64_t first) { return static_cast<const double*>(x.const_data_ptr()) + first; };
  const int64_t bytes = element_size(q), q_row = q.size(1) * q.size(2) * bytes, k_row = k.size(1) * k.size(2) * bytes;
  const auto gradient = [](Tensor& x, int64_t first, int64_t row) { return static_cast<char*>(x.data_ptr()) + first * row; };
  const AttentionBackwardCall whole = attention_backward_call(q, k, v, out, grad, scale);
  std::vector<AttentionBackwardCall> calls;
  for (const Sequence& one : sequences_of(q, k, cu_seqlens_q, cu_seqlens_k)) {
    AttentionBackwardCall call = whole;
    call.causal = causal;
    call.queries = one.queries;
    call.keys = causal ? std::min(one.keys, one.queries) : one.keys;  // what no query sees may be NaN: its gradient is 0
    if (call.queries == 0) call.keys = 0;
    call.q_grad = gradient(q_grad, one.query, q_row);
    call.k_grad = gradient(k_grad, one.key, k_row), call.v_grad = gradient(v_grad, one.key, k_row);
    for (Tensor* x : {&k_grad, &v_grad}) std::memset(gradient(*x, one.key + call.keys, k_row), 0, (one.keys - call.keys) * k_row);
    if (call.keys == 0) {
      std::memset(call.q_grad, 0, one.queries * q_row);
      continue;
    }
    call.q = part(whole.q, one.query, one.queries, bytes), call.out = part(whole.out, one.query, one.queries, bytes);
    call.grad = part(whole.grad, one.query, one.queries, bytes);
    call.k = part(whole.k, one.key, call.keys, bytes), call.v = part(whole.v, one.key, call.keys, bytes);
    call.highest = rows(highest_rows, one.query), call.total = rows(total_rows, one.query);
    call.lse_grad = lse_grad ? rows(lse_rows, one.query) : nullptr;
    calls.push_back(call);
  }
  if (!calls.empty()) run_attention_backward(calls.data(), static_cast<int64_t>(calls.size()));
  return {q_grad, k_grad, v_grad};
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) {
  m.impl("attention_varlen", TORCH_BOX(&fusewire::attention_varlen));
  m.impl("attention_varlen_softmax", TORCH_BOX(&fusewire::attention_varlen_softmax));
  m.impl("attention_varlen_backward", TORCH_BOX(&fusewire::attention_varlen_backward));
}
