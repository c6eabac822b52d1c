"""What triton_kernel.py serves: the predicates of the room's Triton rows."""

from __future__ import annotations

from fusewire.kernels.qk_norm_rope.reference import HALVES_ROTATION
from fusewire.kernels.triton_rows import why_not

MAX_DIM = 1024  # head dimensions; a head's row is held in registers
MAX_ROWS = 2**31 - 4096  # rows (token, head) are numbered in 32 bits; offsets have 64


def why_not_rope(q, k, q_weight, k_weight, cos, sin, eps, norm, exact) -> str:
    if reason := why_not(q, k, q_weight, k_weight):
        return reason
    if norm == HALVES_ROTATION:
        return "the kernel turns adjacent pairs alone"
    if q.shape[3] > MAX_DIM:
        return f"q has heads of {q.shape[3]} dimensions, more than {MAX_DIM}"
    if max(x.shape[0] * x.shape[1] * x.shape[2] for x in (q, k)) > MAX_ROWS:
        return f"q or k has more than {MAX_ROWS} rows"
    return ""


def why_not_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, norm, exact) -> str:
    return why_not_rope(q, k, q_weight, k_weight, cos, sin, eps, norm, exact)
