// adaLN on CUDA: what adaln.cpp (tensors) hands to adaln_kernels.cu (device code).
#pragma once
#include "cuda/views.h"

namespace fusewire::cuda {

enum class Norm : int { none, layer, rms };

// r = x + gate[0] * y[0] + gate[1] * y[1]; out[i] = norm(r) * (1 + scale[i]) + shift[i]. All of one dtype.
struct Adaln {
  Tokens x, y[2], gate[2], shift[2], scale[2], weight, bias;
  void* residual;  // contiguous [B, T, C], where there is a gate
  void* out[2];    // contiguous [B, T, C]
  unsigned rows, tokens;
  int channels, gates, modulations;
  Norm norm;
  float eps;
  bool exact;   // rounds after every operation; `norm` is then none: PyTorch's own kernel has normed x
  bool vector;  // the outputs' rows can be written 16 bytes at a time
};

constexpr int kMaxChannels = 16384;  // a row is held in the registers of one block

// nullptr, or what went wrong.
const char* launch_adaln(const Adaln& task, Type type, void* stream);

}  // namespace fusewire::cuda
