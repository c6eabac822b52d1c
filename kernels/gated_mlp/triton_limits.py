"""What triton_kernel.py serves: the predicates of the room's Triton rows."""

from __future__ import annotations

from fusewire.kernels.gated_mlp.native import predicates
from fusewire.kernels.triton_rows import why_not

MAX_ELEMENTS = 2**31 - 1  # of a row; rows and blocks are numbered in 32 bits, offsets have 64


def _serves(x, *tensors) -> str:
    if reason := why_not(x, *tensors):
        return reason
    width = x.shape[-1]
    if width and x.numel() // width * (-(-width // 64)) > MAX_ELEMENTS:
        return f"x has more than {MAX_ELEMENTS} blocks"
    return ""


why_not_forward, why_not_backward = predicates(_serves)
