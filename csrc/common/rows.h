// A tensor over [B, T, C] as a pointer and strides in elements: what op files hand to *_kernels.cpp. Broadcast dimensions have stride 0.
#pragma once
#include <cstdint>

namespace fusewire {

struct Rows {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, channel = 0;

  template <typename T>
  const T* at(int64_t b, int64_t t) const { return static_cast<const T*>(data) + b * batch + t * token; }
};

}  // namespace fusewire
