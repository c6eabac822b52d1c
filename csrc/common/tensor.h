// What the op files need of LibTorch's stable ABI, under short names. Not for *_kernels.cpp, which see raw pointers only.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

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

// A modulation tensor [B, C], [B, 1, C] or [B, T, C] as strides over (batch, token, channel): broadcast dimensions have stride 0.
struct Modulation {
  const void* data;
  int64_t batch, token, channel;
};
inline Modulation modulation(const Tensor& m, int64_t tokens) {
  const bool per_token = m.dim() == 3 && m.size(1) == tokens && m.size(1) != 1;
  return {m.data_ptr(), m.stride(0), per_token ? m.stride(1) : 0, m.stride(m.dim() - 1)};
}

}  // namespace fusewire
