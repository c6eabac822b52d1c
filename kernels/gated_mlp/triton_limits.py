"""What triton_kernel.py serves: the predicates of the room's Triton rows."""

from __future__ import annotations

from fusewire.kernels.triton_rows import why_not

EXACT = "numerics='exact' keeps PyTorch's own activation"
MAX_ELEMENTS = 2**31 - 1  # of a row; rows and blocks are numbered in 32 bits, offsets have 64


def _why_not(x, *tensors) -> str:
    if reason := why_not(x, *tensors):
        return reason
    width = x.shape[-1]
    if width and x.numel() // width * (-(-width // 64)) > MAX_ELEMENTS:
        return f"x has more than {MAX_ELEMENTS} blocks"
    return ""


def why_not_geglu(x, gate, bias, exact) -> str:
    return EXACT if exact else _why_not(x, gate, bias)


def why_not_swiglu(x, gate, bias, gate_first, exact) -> str:
    return EXACT if exact else _why_not(x, gate, bias)


def why_not_quick_gelu(x, exact) -> str:
    return EXACT if exact else _why_not(x)


def why_not_backward(grad, x, gate, bias, *rest) -> str:
    return _why_not(x, grad, gate, bias)


def why_not_quick_gelu_backward(grad, x) -> str:
    return _why_not(x, grad)
