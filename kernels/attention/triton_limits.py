"""What triton_kernel.py serves: the predicates of the room's Triton rows."""

from __future__ import annotations

import torch

from fusewire.kernels.triton_rows import why_not

TURNED_BEFORE = "q and k are turned by qk_norm_rope before attention there"
MAX_DIM = 512  # head dimensions; a block of queries and its result are held in registers and shared memory
MAX_DIM_BACKWARD = 256  # there two results, and four blocks that are read; half of it in float32, whose three TF32 products err too much over more (on an H200)


def default_scale(scale: float | None, dim: int) -> float:
    return dim**-0.5 if scale is None else scale


def _why_not(q, scale, *tensors) -> str:
    if reason := why_not(q, *tensors):
        return reason
    limit = MAX_DIM if q.dtype.itemsize == 2 else MAX_DIM // 2
    if not 0 < q.shape[-1] <= limit:
        return f"the head dimension is {q.shape[-1]}; 1 to {limit} are served in {q.dtype}"
    if scale is not None and scale <= 0:
        return "scale is not positive"
    return ""


def why_not_attention(q, k, v, mask, q_weight, k_weight, causal, scale, eps, blocks=None, words=None, cos=None, sin=None) -> str:
    if cos is not None:
        return TURNED_BEFORE
    additive = None if mask is None or mask.dtype is torch.bool else mask
    return _why_not(q, scale, k, v, additive, q_weight, k_weight)


def why_not_joint(q, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight, scale, eps, *tables) -> str:
    if any(table is not None for table in tables):
        return TURNED_BEFORE
    return _why_not(q, scale, k, v, q2, k2, v2, q_weight, k_weight, q2_weight, k2_weight)


def why_not_softmax(q, k, v, mask, causal, scale, blocks=None, words=None) -> str:
    return why_not_attention(q, k, v, mask, None, None, causal, scale, 0.0, blocks, words)


def why_not_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, scale) -> str:
    return _why_not(q, scale, k, v)


def _why_no_gradient(q, k, scale, tensors: tuple) -> str:
    if q.numel() == 0 or k.numel() == 0:
        return "a tensor is empty"
    if reason := _why_not(q, scale, *tensors):
        return reason
    limit = MAX_DIM_BACKWARD if q.dtype.itemsize == 2 else MAX_DIM_BACKWARD // 2
    return f"the head dimension is {q.shape[-1]}; gradients are served up to {limit} in {q.dtype}" if q.shape[-1] > limit else ""


def why_not_backward(grad, lse_grad, q, k, v, out, highest, total, mask, causal, scale, blocks=None, words=None) -> str:
    additive = None if mask is None or mask.dtype is torch.bool else mask
    return _why_no_gradient(q, k, scale, (grad, k, v, out, additive))


def why_not_varlen_backward(grad, lse_grad, q, k, v, out, highest, total, cu_seqlens_q, cu_seqlens_k, causal, scale) -> str:
    return _why_no_gradient(q, k, scale, (grad, k, v, out))
