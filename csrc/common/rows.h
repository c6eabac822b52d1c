// Tensors as a pointer and strides in elements: what op files hand to *_kernels.cpp. Broadcast dimensions have stride 0.
#pragma once
#include <cstdint>

namespace fusewire {

// A tensor over [B, T, C].
struct Rows {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, channel = 0;

  template <typename T>
  const T* at(int64_t b, int64_t t) const { return static_cast<const T*>(data) + b * batch + t * token; }
};

// The rows of a tensor [..., C] of any strides (in elements). Leading dimensions that the tensor broadcasts over have stride 0.
struct LeadingRows {
  static constexpr int kMaxDims = 8;
  const void* data;
  int dims;  // leading dimensions
  int64_t sizes[kMaxDims], strides[kMaxDims];
  int64_t channel;
  int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return dims ? at + row * strides[0] : 0;
  }
};

}  // namespace fusewire
