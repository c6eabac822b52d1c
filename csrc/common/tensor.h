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

// x [B, T, C].
inline Rows rows(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

// A modulation tensor [B, C], [B, 1, C] or [B, T, C].
inline Rows modulation(const Tensor& m) {
  if (m.dim() == 2) return {m.const_data_ptr(), m.stride(0), 0, m.stride(1)};
  return {m.const_data_ptr(), m.stride(0), m.size(1) == 1 ? 0 : m.stride(1), m.stride(2)};
}

// A new contiguous CPU tensor [B, T, C] of x's shape and dtype: half the time of new_empty, which goes through the dispatcher.
inline Tensor empty_rows(const Tensor& x) {
  const int64_t sizes[] = {x.size(0), x.size(1), x.size(2)}, strides[] = {sizes[1] * sizes[2], sizes[2], 1};
  int32_t dtype;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(3, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace fusewire
