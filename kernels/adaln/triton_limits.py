"""What triton_kernel.py serves: the predicates of the room's Triton rows. ``exact`` keeps PyTorch's norm and fuses what is around it."""

from __future__ import annotations

from fusewire.kernels.triton_rows import why_not

MAX_CHANNELS = 16384  # a row is held in the registers of one program
MAX_ROWS = 2**31 - 2048  # rows are numbered in 32 bits; offsets have 64


def _why_not(x, *tensors) -> str:
    if reason := why_not(x, *tensors):
        return reason
    if x.shape[2] > MAX_CHANNELS:
        return f"x has {x.shape[2]} channels, more than {MAX_CHANNELS}"
    if x.shape[0] * x.shape[1] > MAX_ROWS:
        return f"x has more than {MAX_ROWS} rows"
    return ""


def why_not_modulate(x, shift, scale, weight, bias, eps, rms, exact) -> str:
    return _why_not(x, shift, scale, weight, bias)


def why_not_modulate_dual(x, shift, scale, shift2, scale2, eps, exact) -> str:
    return _why_not(x, shift, scale, shift2, scale2)


def why_not_gate(x, y, gate, exact) -> str:
    return _why_not(x, y, gate)


def why_not_gate_modulate(x, y, gate, y2, gate2, shift, scale, weight, bias, eps, rms, exact) -> str:
    return _why_not(x, y, gate, y2, gate2, shift, scale, weight, bias)
