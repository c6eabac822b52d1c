// What the CUDA op files need of LibTorch's stable ABI. Not for *_kernels.cu, which see raw pointers only.
#pragma once
#if !defined(USE_CUDA)
#define USE_CUDA  // shim.h then declares aoti_torch_get_current_cuda_stream
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>

#include "common/tensor.h"
#include "cuda/views.h"

// The tests build these files for the CPU (tests/kernels/cuda_on_cpu).
#if defined(FUSEWIRE_CUDA_ON_CPU)
#define FUSEWIRE_CUDA_KEY CPU
#else
#define FUSEWIRE_CUDA_KEY CUDA
#endif

namespace fusewire::cuda {

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, "fusewire's CUDA kernels serve float32, bfloat16 and float16");
  }
}

// A stride over a single element is never taken: it must not decide about alignment.
inline int64_t stride(const Tensor& x, int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim); }

// Whether rows that start at multiples of the outer strides can be moved 16 bytes at a time.
inline bool vectors(const Tensor& x, int64_t channel, std::initializer_list<int64_t> outer) {
  const int64_t itemsize = element_size(x);
  bool aligned = channel == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (const int64_t step : outer) aligned = aligned && step * itemsize % 16 == 0;
  return aligned;
}

// x [B, T, C], a modulation [B, C], [B, 1, C] or [B, T, C], or a vector [C].
inline Tokens tokens(const Tensor& x) {
  const int64_t dims = x.dim();
  const int64_t channel = stride(x, dims - 1), token = dims == 3 ? stride(x, 1) : 0, batch = dims > 1 ? stride(x, 0) : 0;
  return {x.const_data_ptr(), batch, token, channel, vectors(x, channel, {batch, token})};
}
inline Tokens tokens(const std::optional<Tensor>& x) { return x ? tokens(*x) : Tokens{}; }

// x [B, T, H, D], an input or an output.
inline Heads heads(const Tensor& x) {
  const int64_t strides[4] = {stride(x, 0), stride(x, 1), stride(x, 2), stride(x, 3)};
  return {const_cast<void*>(x.const_data_ptr()), strides[0], strides[1], strides[2], strides[3],
          vectors(x, strides[3], {strides[0], strides[1], strides[2]})};
}

// Makes the tensor's device the current one while it lives, and knows the stream to launch on.
class OnDevice {
 public:
#if defined(FUSEWIRE_CUDA_ON_CPU)
  explicit OnDevice(const Tensor&) : stream_(this) { current_stream = stream_; }
  ~OnDevice() { current_stream = nullptr; }
#else
  explicit OnDevice(const Tensor& x) : guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
#endif
  void* stream() const { return stream_; }

 private:
#if !defined(FUSEWIRE_CUDA_ON_CPU)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

inline void check_launch(const char* name, const char* error) { STD_TORCH_CHECK(error == nullptr, name, ": the launch failed: ", error); }

}  // namespace fusewire::cuda
