// Gradients of attention on the CPU: what attention_backward.cpp (tensors, threads) hands to the kernels.
#pragma once
#include "cpu/attention.h"

namespace fusewire {

// q, k, v, out and grad (that of out) are [B, T, H, D] of any strides. The gradients are contiguous, in the type of the inputs.
struct AttentionBackwardCall {
  AttentionTensor q, k, v, out, grad;
  AttentionMask mask;
  AttentionPattern pattern;
  AttentionType type;
  int64_t batches, heads, queries, keys, channels;
  int64_t group;  // query heads for each key head
  double scale;
  bool causal;
  // [B, H, softmax_rows]: each query's highest logit, and the sum of exp(logit - highest): 0 where it attends to no key
  const double *highest, *total;
  const double* lse_grad;  // of the same shape, or null
  int64_t softmax_rows;
  void *q_grad, *k_grad, *v_grad;
};

// One key head of one sample with the query heads that attend to it.
struct AttentionBackwardTask { int64_t batch, head; };

FUSEWIRE_DECLARE(void, attention_backward_task, (const AttentionBackwardCall&, const AttentionBackwardTask&))
// False, with nothing written, where the head holds what does not split into bfloat16 parts.
namespace amx { bool attention_backward_task(const AttentionBackwardCall&, const AttentionBackwardTask&); }

}  // namespace fusewire
