// Tensors as the attention kernels see them. For the op files.
#pragma once
#include <cmath>
#include <optional>

#include "common/empty.h"
#include "cpu/attention_backward.h"

namespace fusewire {

inline AttentionType attention_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return AttentionType::f32;
    case ScalarType::BFloat16: return AttentionType::bf16;
    case ScalarType::Half: return AttentionType::f16;
    case ScalarType::Double: return AttentionType::f64;
    case ScalarType::Bool: return AttentionType::boolean;
    default: STD_TORCH_CHECK(false, "attention: unsupported dtype");
  }
}

// x [B, T, H, D] or, of one sample, [T, H, D].
inline AttentionTensor attention_view(const Tensor& x) {
  const int64_t t = x.dim() - 3;
  return {x.data_ptr(), t ? x.stride(0) : 0, x.stride(t), x.stride(t + 1), x.stride(t + 2), x.size(t)};
}

// mask [B or 1, H or 1, Tq or 1, Tk].
inline AttentionMask attention_mask(const Tensor& mask, const Tensor& q, const Tensor& k) {
  const int64_t sizes[4] = {q.size(0), q.size(2), q.size(1), k.size(1)};
  int64_t strides[4] = {};
  for (int64_t i = 0; i < 4; ++i) strides[i] = mask.size(i) == 1 && sizes[i] != 1 ? 0 : mask.stride(i);
  return {mask.data_ptr(), attention_type(mask.scalar_type()), strides[0], strides[1], strides[2], strides[3]};
}

// blocks [B or 1, H or 1, blocks of queries, blocks of keys] and words [number, 32], contiguous.
inline AttentionPattern attention_pattern(const std::optional<Tensor>& blocks, const std::optional<Tensor>& words, int64_t queries, int64_t keys) {
  if (!blocks) return {};
  const auto count = [](int64_t tokens) { return (tokens + kPatternBlock - 1) / kPatternBlock; };
  STD_TORCH_CHECK(words && blocks->dim() == 4 && blocks->size(2) == count(queries) && blocks->size(3) == count(keys) && blocks->is_contiguous() &&
                      words->is_contiguous(), "attention: the pattern is for other lengths");
  const auto stride = [&](int64_t i) { return blocks->size(i) == 1 ? 0 : blocks->stride(i); };
  const auto data = [](const Tensor& x) { return static_cast<const int32_t*>(x.const_data_ptr()); };
  return {data(*blocks), data(*words), stride(0), stride(1), blocks->stride(2)};
}

inline double attention_scale(int64_t channels, std::optional<double> scale) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(channels));
}

inline AttentionCall attention_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, std::optional<double> scale, double eps) {
  const int64_t t = q.dim() - 3;
  AttentionCall call{};
  call.q[0] = attention_view(q);
  call.k[0] = attention_view(k);
  call.v[0] = attention_view(v);
  call.out[0] = attention_view(out);
  call.type = attention_type(q.scalar_type());
  call.queries = call.softmax_rows = q.size(t);
  call.keys = k.size(t);
  call.channels = q.size(t + 2);
  call.heads = q.size(t + 1);
  call.group = k.size(t + 1) ? call.heads / k.size(t + 1) : 1;
  call.scale = attention_scale(call.channels, scale);
  call.eps = eps;
  return call;
}

inline AttentionBackwardCall attention_backward_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& grad,
                                                     std::optional<double> scale) {
  STD_TORCH_CHECK(q.scalar_type() != ScalarType::Double, "attention_backward: float64 is the reference's");
  const int64_t t = q.dim() - 3;
  AttentionBackwardCall call{};
  call.q = attention_view(q), call.k = attention_view(k), call.v = attention_view(v);
  call.out = attention_view(out), call.grad = attention_view(grad);
  call.type = attention_type(q.scalar_type());
  call.batches = t ? q.size(0) : 1;
  call.queries = call.softmax_rows = q.size(t), call.heads = q.size(t + 1), call.channels = q.size(t + 2);
  call.keys = k.size(t), call.group = call.heads / k.size(t + 1);
  call.scale = attention_scale(call.channels, scale);
  return call;
}

// Run all calls, `batch` samples of each, on all threads.
void run_attention(const AttentionCall* calls, int64_t count, int64_t batch);
void run_attention_backward(const AttentionBackwardCall* calls, int64_t count);

}  // namespace fusewire
