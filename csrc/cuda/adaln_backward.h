// The gradients of adaLN on CUDA: what adaln_backward.cpp (tensors) hands to adaln_backward_kernels.cu (device code).
#pragma once
#include "cuda/adaln.h"

namespace fusewire::cuda {

// With r = x + gate[0] * y[0] + gate[1] * y[1], n = norm(r) * weight + bias and out[i] = n * (1 + scale[i]) + shift[i]: the gradients of what is read,
// in the rounding of `close`. All of one dtype, [B, T, C]. What is not wanted is null.
struct AdalnGradient {
  // Kinds of sums over tokens, in this order: the gates, shift and scale of each modulation, weight and bias.
  static constexpr int kMaxKinds = 8;

  Tokens grad_residual;           // of r, where there are gates
  Tokens grad[2];                 // of out
  Tokens x, y[2], gate[2], scale[2], weight, bias;  // x is absent where there is no modulation
  void *dx, *dy[2];               // contiguous
  void* of_tokens[kMaxKinds];     // contiguous: where each token has a gradient of its own, which is no sum
  float* parts_of[kMaxKinds];     // [B, parts, C]: sums over a part of a sample's tokens
  unsigned parts, of_sample, tokens, steps;  // parts of all samples and of one, tokens of one and of a part
  int channels, gates, modulations;
  Norm norm;
  float eps;
  bool affine;  // a weight, a bias or both
  bool vector;  // the rows of all that is written can be written 16 bytes at a time
};

constexpr int kMaxGradientChannels = 4096;  // a thread has 8 of them, a block 512 threads: the sums beside the row leave no more registers

// nullptr, or what went wrong.
const char* launch_adaln_gradient(const AdalnGradient& task, Type type, void* stream);

}  // namespace fusewire::cuda
