"""What csrc/cpu/adaln.cpp serves: the predicates of the room's CPU rows."""

from __future__ import annotations

from fusewire.kernels.library import CPU


def why_not_modulate(x, shift, scale, weight, bias, eps, rms, exact) -> str:
    if not CPU.loaded:
        return CPU.reason
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if not (x.dtype is shift.dtype is scale.dtype):
        return "x, shift and scale differ in dtype"
    if exact or rms or weight is not None or bias is not None:
        return "the CPU kernel serves the plain LayerNorm with numerics='close'"
    return ""
