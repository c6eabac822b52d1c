// Attention on the CPU: fusewire::attention and fusewire::joint_attention.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/attention_tensors.h"

namespace fusewire {

// A norm weight as doubles, kept alive by `keep`.
static const double* weight_of(const std::optional<Tensor>& weight, std::vector<std::vector<double>>& keep) {
  if (!weight) return nullptr;
  const int64_t n = weight->size(0), stride = weight->stride(0);
  std::vector<double> values(n);
  FUSEWIRE_SWITCH_FLOATS(weight->scalar_type(), "attention", {
    const scalar_t* p = static_cast<const scalar_t*>(weight->data_ptr());
    for (int64_t i = 0; i < n; ++i) values[i] = static_cast<double>(to_float(p[i * stride]));
  });
  keep.push_back(std::move(values));
  return keep.back().data();
}

// A table of cosines or sines [T, D/2] whose rows lie one after the other: copied where they do not.
static const float* table_of(const Tensor& table, std::vector<std::vector<float>>& keep) {
  const int64_t tokens = table.size(0), angles = table.size(1), token = table.stride(0), angle = table.stride(1);
  const float* p = static_cast<const float*>(table.const_data_ptr());
  if (angle == 1 && token == angles) return p;
  std::vector<float>& copy = keep.emplace_back(tokens * angles);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < angles; ++i) copy[t * angles + i] = p[t * token + i * angle];
  }
  return copy.data();
}

// The queries and keys of one piece turn by the same angles.
static void turn(AttentionTensor& q, AttentionTensor& k, const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, int64_t channels,
                 std::vector<std::vector<float>>& keep) {
  if (!cos) return;
  const auto fits = [&](const Tensor& table) {
    return table.scalar_type() == ScalarType::Float && table.dim() == 2 && table.size(0) == q.tokens && 2 * table.size(1) == channels;
  };
  STD_TORCH_CHECK(sin && q.tokens == k.tokens && fits(*cos) && fits(*sin), "attention: the tables are for other tokens or channels");
  q.angles = k.angles = channels / 2;
  q.cos = k.cos = table_of(*cos, keep);
  q.sin = k.sin = table_of(*sin, keep);
}

// Cuts the queries of all calls into tasks and runs them. Threads take tasks as they become free; results do not depend on which thread ran what.
void run_attention(const AttentionCall* calls, int64_t count, int64_t batch) {
  const auto vectors = FUSEWIRE_PICK(void (*)(const AttentionCall&, const AttentionTask&), attention_task);
  auto kernel = vectors;
  int64_t block = kAttentionQueryBlock;
#if defined(FUSEWIRE_HAS_AMX)
  if (active_isa() == Isa::amx) {
    kernel = amx::attention_task;
    block = kAttentionAmxQueryBlock;
  }
#endif
  const auto blocks_of = [&](const AttentionCall& call) { return (call.queries + block - 1) / block; };
  int64_t blocks = 0, products = 0;
  for (int64_t i = 0; i < count; ++i) {
    blocks += batch * calls[i].heads * blocks_of(calls[i]);
    products += batch * calls[i].heads * calls[i].queries * calls[i].keys * calls[i].channels;
  }
  if (blocks == 0) return;
  // Waking a second thread takes longer than a hundred thousand products.
  const bool small = products < 100'000;
  const int64_t threads = small ? 1 : torch::stable::get_num_threads();
  // A task packs the keys and values of its head again: at least 8 blocks where there is enough work for all threads, at most kAttentionMaxBlocks.
  const int64_t size = std::clamp<int64_t>(blocks / (4 * threads), std::min<int64_t>(8, 1 + blocks / (2 * threads)), kAttentionMaxBlocks);
  const auto pieces_of = [&](const AttentionCall& call) { return (blocks_of(call) + size - 1) / size; };  // of a head
  std::vector<int64_t> ends(count);  // the tasks of a call end where the next one's begin
  for (int64_t i = 0; i < count; ++i) ends[i] = (i ? ends[i - 1] : 0) + batch * calls[i].heads * pieces_of(calls[i]);
  const int64_t tasks = ends.back();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, tasks), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < tasks; i = next++) {
      const int64_t at = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin(), task = i - (at ? ends[at - 1] : 0);
      const AttentionCall& call = calls[at];
      const int64_t pieces = pieces_of(call), length = (blocks_of(call) + pieces - 1) / pieces * block;  // as equal as can be
      const int64_t piece = task % pieces, head = task / pieces % call.heads, b = task / pieces / call.heads;
      // Few float32 queries fill no tile, and sum in shorter chains without
      const bool few = call.type == AttentionType::f32 && call.queries < kAttentionFewQueries;
      (few ? vectors : kernel)(call, {b, head, piece * length, std::min(call.queries, (piece + 1) * length)});
    }
  });
}

static AttentionCall whole_call(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, const Tensor& out, bool causal,
                                std::optional<double> scale, double eps, const std::optional<Tensor>& blocks, const std::optional<Tensor>& words) {
  AttentionCall call = attention_call(q, k, v, out, scale, eps);
  call.causal = causal;
  if (mask) call.mask = attention_mask(*mask, q, k);
  call.pattern = attention_pattern(blocks, words, call.queries, call.keys);
  return call;
}

static Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask, const std::optional<Tensor>& q_weight,
                        const std::optional<Tensor>& k_weight, bool causal, std::optional<double> scale, double eps,
                        const std::optional<Tensor>& blocks, const std::optional<Tensor>& words, const std::optional<Tensor>& cos,
                        const std::optional<Tensor>& sin) {
  Tensor out = empty_contiguous(q);
  AttentionCall call = whole_call(q, k, v, mask, out, causal, scale, eps, blocks, words);
  std::vector<std::vector<double>> keep;
  std::vector<std::vector<float>> tables;
  call.q[0].weight = weight_of(q_weight, keep);
  call.k[0].weight = weight_of(k_weight, keep);
  turn(call.q[0], call.k[0], cos, sin, call.channels, tables);
  run_attention(&call, 1, q.size(0));
  return out;
}

// Also each query's highest logit, and the sum of exp(logit - highest), in float64 [B, H, Tq]: what the gradients and the log-sum-exp need.
static std::tuple<Tensor, Tensor, Tensor> attention_softmax(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask,
                                                            bool causal, std::optional<double> scale, const std::optional<Tensor>& blocks,
                                                            const std::optional<Tensor>& words) {
  Tensor out = empty_contiguous(q);
  Tensor highest = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Double);
  Tensor total = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Double);
  AttentionCall call = whole_call(q, k, v, mask, out, causal, scale, 1.0, blocks, words);
  call.highest = static_cast<double*>(highest.data_ptr());
  call.total = static_cast<double*>(total.data_ptr());
  run_attention(&call, 1, q.size(0));
  return {out, highest, total};
}

static std::tuple<Tensor, Tensor> joint_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q2, const Tensor& k2,
                                                  const Tensor& v2, const std::optional<Tensor>& q_weight, const std::optional<Tensor>& k_weight,
                                                  const std::optional<Tensor>& q2_weight, const std::optional<Tensor>& k2_weight,
                                                  std::optional<double> scale, double eps, const std::optional<Tensor>& cos,
                                                  const std::optional<Tensor>& sin, const std::optional<Tensor>& cos2,
                                                  const std::optional<Tensor>& sin2) {
  Tensor out = empty_contiguous(q), out2 = empty_contiguous(q2);
  AttentionCall call = attention_call(q, k, v, out, scale, eps);
  std::vector<std::vector<double>> keep;
  call.q[1] = attention_view(q2);
  call.k[1] = attention_view(k2);
  call.v[1] = attention_view(v2);
  call.out[1] = attention_view(out2);
  call.q[0].weight = weight_of(q_weight, keep);
  call.k[0].weight = weight_of(k_weight, keep);
  call.q[1].weight = weight_of(q2_weight, keep);
  call.k[1].weight = weight_of(k2_weight, keep);
  call.queries += q2.size(1);
  call.keys += k2.size(1);
  std::vector<std::vector<float>> tables;
  turn(call.q[0], call.k[0], cos, sin, call.channels, tables);
  turn(call.q[1], call.k[1], cos2, sin2, call.channels, tables);
  run_attention(&call, 1, q.size(0));
  return {out, out2};
}

}  // namespace fusewire

STABLE_TORCH_LIBRARY_IMPL(fusewire, CPU, m) {
  m.impl("attention", TORCH_BOX(&fusewire::attention));
  m.impl("attention_softmax", TORCH_BOX(&fusewire::attention_softmax));
  m.impl("joint_attention", TORCH_BOX(&fusewire::joint_attention));
}
