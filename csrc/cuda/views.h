// Tensors as the CUDA kernels take them: what *.cpp (tensors) hands to *_kernels.cu (device code). Strides are in elements and have 64 bits.
#pragma once
#include <cstdint>

namespace fusewire::cuda {

enum class Type { float32, bfloat16, float16 };

// A tensor over [B, T, C]; `vector`: every row can be read 16 bytes at a time.
struct Tokens {
  const void* data = nullptr;
  int64_t batch = 0, token = 0, channel = 0;
  bool vector = false;
};

// A tensor over [B, T, H, D].
struct Heads {
  void* data = nullptr;  // written to where it is an output
  int64_t batch = 0, token = 0, head = 0, channel = 0;
  bool vector = false;
};

constexpr int64_t kMaxBlocks = 2147483647;  // along x; y and z, with 65,535, are never used

#if defined(FUSEWIRE_CUDA_ON_CPU)
inline const void* current_stream = nullptr;  // of the tests' machine, where a tensor's device is the current one (OnDevice)
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fusewire::cuda
