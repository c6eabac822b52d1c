"""What is done to q and k before attention: RMS norm of each head, and the rotation of its pairs.

The CPU library does both while it packs q and k into its tiles, without a pass over memory. Elsewhere, and where gradients are wanted, they are a pass of
``qk_norm_rope``: on a GPU every block of queries reads every key, which would then be rotated again for each.
"""

from __future__ import annotations

from fusewire.kernels.dispatch import forced_backend
from fusewire.kernels.norm.op import rms_norm
from fusewire.kernels.qk_norm_rope.forms import padded, tables
from fusewire.kernels.qk_norm_rope.op import qk_norm_rope

APART = ("cuda", "triton")  # backends whose attention takes no tables


def normalised(x, weight, eps: float):
    return x if weight is None else rms_norm(x, weight, eps=eps, rounding="torch", numerics="close")


def apart(q, k, q_weight, k_weight, rope, eps: float):
    """-> q and k, normalised where they have a weight, and turned."""
    if q_weight is not None and k_weight is not None and q_weight.dtype is q.dtype is k_weight.dtype:
        return qk_norm_rope(q, k, q_weight, k_weight, rope=rope, eps=eps, norm="torch_rms", numerics="close")
    q, k = normalised(q, q_weight, eps), normalised(k, k_weight, eps)
    return qk_norm_rope(q, k, rope=rope, norm="none", numerics="close")


def within(q, *ropes) -> bool:
    """Whether attention itself turns q and k by such tables, one for all samples: the CPU's rows do."""
    shared = all(rope is None or tables(rope)[0].dim() == 2 for rope in ropes)
    return shared and q.is_cpu and forced_backend() not in APART


def full(rope, dim: int):
    """(cos, sin) [T, D/2] as the op takes them; twice None where nothing is turned."""
    return (None, None) if rope is None else padded(*tables(rope), dim // 2)
