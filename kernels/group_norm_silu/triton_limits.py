"""What triton_kernel.py serves: the predicates of the room's Triton rows."""

from __future__ import annotations

from fusewire.kernels.triton_rows import why_not

MAX_GROUP = 2**31 - 2**20  # elements of a group are numbered in 32 bits; offsets have 64


def _why_not(x, groups, *tensors) -> str:
    if reason := why_not(x, *tensors):
        return reason
    if x.numel() // max(x.shape[0] * groups, 1) > MAX_GROUP:
        return f"x has groups of more than {MAX_GROUP} elements"
    return ""


def why_not_forward(x, groups, weight, bias, eps, shift, scale, add, silu, exact) -> str:
    if exact:
        return "numerics='exact' keeps PyTorch's own norm"
    return _why_not(x, groups, weight, bias, shift, scale, add)


def why_not_backward(grad, x, groups, weight, bias, eps, shift, scale, add, silu, of_x) -> str:
    return _why_not(x, groups, grad, weight, bias, shift, scale, add)
