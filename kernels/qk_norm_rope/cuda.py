"""QK norm with rotary embedding by csrc/cuda: the predicates of the room's CUDA rows, and what they launch.

``close`` norms, weighs and rotates in one kernel. ``exact`` takes the reciprocal root from PyTorch's own reduction (for torch.nn.RMSNorm: the norm
itself) and fuses the rest, rounding where the stock modules round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels import cuda_rows
from fusewire.kernels.qk_norm_rope.reference import ROTATION, TORCH_RMS
from fusewire.kernels.qk_norm_rope.triton_limits import beyond, predicates

MAX_DIM = 1024  # a head's row is held in the registers of one warp
MAX_ROWS = 2**31 - 256  # rows (token, head) are numbered in 32 bits; offsets have 64
NONE, GIVEN, COMPUTED = 0, 1, 2  # the reciprocal root mean square: not applied, read, computed

op = cuda_rows.raw("cuda_qk_norm(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_root, Tensor? k_root, Tensor(a!) q_out, "
                   "Tensor(b!) k_out, Tensor? cos, Tensor? sin, float eps, int root, bool exact) -> ()")


def _serves(norm, q, k, *weights) -> str:
    return cuda_rows.why_not(q, k, *weights) or beyond(q, k, norm, MAX_DIM, MAX_ROWS) or cuda_rows.better_by_triton(q)


why_not_rope, why_not_into = predicates(_serves)


def _stock_root(x, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) for each row, by the calls of diffusers' RMSNorm on a contiguous x."""
    return torch.rsqrt(x.to(torch.float32, memory_format=torch.contiguous_format).pow(2).mean(-1, keepdim=True) + eps)


def qk_norm_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps: float, norm: int, exact: bool) -> None:
    if norm == ROTATION:
        op(q, k, None, None, None, None, q_out, k_out, cos, sin, eps, NONE, exact)
    elif not exact:
        op(q, k, q_weight, k_weight, None, None, q_out, k_out, cos, sin, eps, COMPUTED, False)
    elif norm != TORCH_RMS:
        op(q, k, q_weight, k_weight, _stock_root(q, eps), _stock_root(k, eps), q_out, k_out, cos, sin, eps, GIVEN, True)
    else:
        q, k = (F.rms_norm(x.contiguous(), x.shape[-1:], weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
        if cos is None:
            q_out.copy_(q)
            k_out.copy_(k)
        else:
            op(q, k, None, None, None, None, q_out, k_out, cos, sin, eps, NONE, True)


def qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps: float, norm: int, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    qk_norm_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, norm, exact)
    return q_out, k_out
