// What the op files need of LibTorch's stable ABI, under short names. Not for *_kernels.cpp, which see raw pointers only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "common/rows.h"
#include "common/scalar.h"

namespace fusewire {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Runs BODY with scalar_t set to the storage type of `type`.
#define FUSEWIRE_SWITCH_FLOATS(type, name, ...)                                                            \
  switch (type) {                                                                                          \
    case ScalarType::Float: { using scalar_t = float; __VA_ARGS__; break; }                                \
    case ScalarType::BFloat16: { using scalar_t = ::fusewire::bfloat16; __VA_ARGS__; break; }              \
    case ScalarType::Half: { using scalar_t = ::fusewire::float16; __VA_ARGS__; break; }                   \
    case ScalarType::Double: { using scalar_t = double; __VA_ARGS__; break; }                              \
    default: STD_TORCH_CHECK(false, name, ": unsupported dtype");                                          \
  }

inline int64_t element_size(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// x [B, T, C].
inline Rows rows(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// The rows of t as rows of a tensor whose leading dimensions are those of x: t broadcasts over missing dimensions and those of size 1.
inline LeadingRows leading_rows(const Tensor& t, const Tensor& x) {
  LeadingRows rows{t.const_data_ptr(), static_cast<int>(x.dim()) - 1, {}, {}, t.size(t.dim() - 1) == 1 ? 0 : t.stride(t.dim() - 1)};
  STD_TORCH_CHECK(rows.dims <= LeadingRows::kMaxDims, "x has more than 9 dimensions");
  for (int d = 0; d < rows.dims; ++d) {
    const int64_t own = d - (x.dim() - t.dim());
    rows.sizes[d] = x.size(d);
    rows.strides[d] = own < 0 || t.size(own) == 1 ? 0 : t.stride(own);
  }
  return rows;
}

// A modulation tensor [B, C], [B, 1, C] or [B, T, C].
inline Rows modulation(const Tensor& m) {
  if (m.dim() == 2) return {m.const_data_ptr(), m.stride(0), 0, m.stride(1)};
  return {m.const_data_ptr(), m.stride(0), m.size(1) == 1 ? 0 : m.stride(1), m.stride(2)};
}

}  // namespace fusewire
