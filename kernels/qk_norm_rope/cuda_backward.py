"""The gradients of QK norm by csrc/cuda, in the rounding of ``close``: the predicate of the CUDA row, and what it launches.

q and k are one launch. What a weight gets is a sum over all rows (token, head), in two steps and without atomics: parts, whose size follows from the
number of elements alone, then the sum of the parts.
"""

from __future__ import annotations

import torch

from fusewire.kernels import cuda_rows
from fusewire.kernels.qk_norm_rope import triton_limits
from fusewire.kernels.qk_norm_rope.cuda import MAX_DIM, MAX_ROWS
from fusewire.kernels.qk_norm_rope.reference import RMS

PARTS, SMALLEST, LARGEST = 512, 2**11, 2**16  # of a weight's sum: so many, of so many elements each

op = cuda_rows.raw("cuda_qk_norm_backward(Tensor q_grad, Tensor k_grad, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
                   "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dq_weight, Tensor(d!)? dk_weight, Tensor(e!)? q_sums, Tensor(f!)? k_sums, float eps) -> ()")


def why_not(*args) -> str:
    q_grad, k_grad, q, k, q_weight, k_weight = args[:6]
    if reason := cuda_rows.why_not(q, k, q_grad, k_grad, q_weight, k_weight) or triton_limits.beyond(q, k, RMS, MAX_DIM, MAX_ROWS):
        return reason
    if (reason := cuda_rows.better_by_triton(q)) and not triton_limits.why_not_backward(*args):
        return reason
    return ""


def parts_of(elements: int) -> int:
    """Into how many parts a weight's sum over so many elements of q or of k is cut."""
    return -(-elements // min(max(elements // PARTS, SMALLEST), LARGEST))


def qk_norm_rope_backward(q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, eps: float, wanted: int) -> tuple[torch.Tensor, ...]:
    """As the reference's, all of one dtype; bit i of ``wanted`` asks for the gradient of the i-th of q, k, q_weight and k_weight."""
    dq, dk, dq_weight, dk_weight = found = [None if x is None or not wanted >> i & 1 else x.new_empty(x.shape) for i, x in enumerate((q, k, q_weight, k_weight))]
    q_sums, k_sums = (None if total is None else x.new_empty((parts_of(x.numel()), x.shape[3]), dtype=torch.float32)
                      for x, total in ((q, dq_weight), (k, dk_weight)))
    op(q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, dq, dk, dq_weight, dk_weight, q_sums, k_sums, eps)
    return tuple(q.new_empty(0) if gradient is None else gradient for gradient in found)
