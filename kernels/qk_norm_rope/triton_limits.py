"""What triton_kernel.py serves: the predicates of the room's Triton rows."""

from __future__ import annotations

from fusewire.kernels.qk_norm_rope.reference import HALVES_ROTATION, RMS
from fusewire.kernels.triton_rows import why_not

MAX_DIM = 1024  # head dimensions; a head's row is held in registers
MAX_ROWS = 2**31 - 4096  # rows (token, head) are numbered in 32 bits; offsets have 64
MAX_BACKWARD_ROWS = 2**30  # the last program may count on beyond the rows


def beyond(q, k, norm: int, dim: int, rows: int) -> str:
    """Why a kernel for heads of at most ``dim`` dimensions that counts so many rows cannot serve q and k; ``""`` where it can."""
    if norm == HALVES_ROTATION:
        return "the kernel turns adjacent pairs alone"
    if q.shape[3] > dim:
        return f"q has heads of {q.shape[3]} dimensions, more than {dim}"
    if max(x.shape[0] * x.shape[1] * x.shape[2] for x in (q, k)) > rows:
        return f"q or k has more than {rows} rows"
    return ""


def predicates(serves):
    """(why_not_rope, why_not_into) of a backend that ``serves(norm, q, k, q_weight, k_weight)``, q, k and what becomes of them in one dtype."""
    def why_not_rope(q, k, q_weight, k_weight, cos, sin, eps, norm, exact) -> str:
        if k.dtype is not q.dtype:
            return "k differs from q in dtype"
        return serves(norm, q, k, q_weight, k_weight)

    def why_not_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, norm, exact) -> str:
        if any(x.dtype is not q.dtype for x in (k, q_out, k_out)):
            return "k or an output differs from q in dtype"
        return serves(norm, q, k, q_weight, k_weight)

    return why_not_rope, why_not_into


def _serves(norm, q, k, *weights) -> str:
    return why_not(q, k, *weights) or beyond(q, k, norm, MAX_DIM, MAX_ROWS)


why_not_rope, why_not_into = predicates(_serves)


def why_not_backward(q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, eps, wanted) -> str:
    """One dtype throughout: the gradients of others are left to the reference."""
    if reason := why_not(q, k, q_grad, k_grad, q_weight, k_weight) or beyond(q, k, RMS, MAX_DIM, MAX_BACKWARD_ROWS):
        return reason
    if any(tensor is not None and tensor.dtype is not q.dtype for tensor in (q_grad, k_grad, k, q_weight, k_weight)):
        return "the arguments differ in dtype"
    return ""
