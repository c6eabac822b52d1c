// Tensors as the attention kernels see them. For the op files.
#pragma once
#include <cmath>
#include <optional>

#include "common/empty.h"
#include "cpu/attention.h"

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

// x [B, T, H, D].
inline AttentionTensor attention_view(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3), x.size(1), nullptr};
}

// mask [B or 1, H or 1, Tq or 1, Tk].
inline AttentionMask attention_mask(const Tensor& mask, const Tensor& q, const Tensor& k) {
  const int64_t sizes[4] = {q.size(0), q.size(2), q.size(1), k.size(1)};
  int64_t strides[4] = {};
  for (int64_t i = 0; i < 4; ++i) strides[i] = mask.size(i) == 1 && sizes[i] != 1 ? 0 : mask.stride(i);
  return {mask.data_ptr(), attention_type(mask.scalar_type()), strides[0], strides[1], strides[2], strides[3]};
}

inline double attention_scale(const Tensor& q, std::optional<double> scale) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(q.size(3)));
}

}  // namespace fusewire
