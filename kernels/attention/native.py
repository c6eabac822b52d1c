"""What csrc/cpu/attention.cpp serves: the predicates of the room's CPU rows."""

from __future__ import annotations

import torch

from fusewire.kernels.library import CPU

FEW_QUERIES = 16
MAX_CHANNELS = 512  # rows are staged in buffers of this size


def _why_not(q) -> str:
    if not CPU.loaded:
        return CPU.reason
    if not q.is_cpu:
        return "q is on a GPU" if q.is_cuda else f"q is on {q.device}"
    if not 0 < q.shape[-1] <= MAX_CHANNELS:
        return f"the head dimension is {q.shape[-1]}; 1 to {MAX_CHANNELS} are served"
    return ""


def why_not_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale) -> str:
    return _why_not(q)


def why_not_attention(q, k, v, mask, q_weight, k_weight, causal, scale, eps, blocks=None, words=None, cos=None, sin=None) -> str:
    return _why_not(q)


def why_not_joint(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale, eps, cos=None, sin=None, cos2=None, sin2=None) -> str:
    return _why_not(q)


def why_not_softmax(q, k, v, mask, causal, scale, blocks=None, words=None) -> str:
    return _why_not(q)


def _why_no_gradient(q, k) -> str:
    if q.dtype is torch.float64:
        return "q has dtype torch.float64"
    if q.numel() == 0 or k.numel() == 0:
        return "a tensor is empty"
    return ""


def why_not_backward(grad, lse_grad, q, k, v, out, highest, total, mask, causal, scale, blocks=None, words=None) -> str:
    return _why_no_gradient(q, k) or _why_not(q)


def why_not_varlen_backward(grad, lse_grad, q, k, v, out, highest, total, cu_seqlens_q, cu_seqlens_k, causal, scale) -> str:
    return _why_no_gradient(q, k) or _why_not(q)
