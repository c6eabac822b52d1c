"""What csrc/cpu/qk_norm_rope.cpp serves: the predicates of the room's CPU rows."""

from __future__ import annotations

import torch

from fusewire.kernels.library import CPU
from fusewire.kernels.qk_norm_rope import reference
from fusewire.kernels.rounding import differs_from_stock, probe_values

differs = [CPU.reason, CPU.reason]  # by norm: why the exact row stands down


def compare_with_stock(op) -> None:
    """Find out, for each norm, whether the kernel's exact mode and the installed torch agree."""
    if not CPU.loaded:
        return
    # Head dimensions below, at and beyond each step of the summation; float64 sums in other lanes
    dims = (3, 8, 15, 40, 64, 72, 128, 200, 1050)
    kinds = [(torch.float32, dim) for dim in dims] + [(dtype, 72) for dtype in (torch.bfloat16, torch.float16, torch.float64)]
    rope = tuple(probe_values(3, 36, seed=seed) for seed in (3, 4))
    for norm in (reference.RMS, reference.TORCH_RMS):
        cases = []
        for dtype, dim in kinds + [(torch.float64, 525)] * (norm == reference.TORCH_RMS):
            x, weight = probe_values(1, 3, 2, dim, dtype=dtype), probe_values(dim, dtype=dtype, seed=2)
            cases.append((x, x, weight, None, *(rope if dim == 72 else (None, None)), 1e-6, norm, True))
        differs[norm] = differs_from_stock(op, reference.qk_norm_rope, cases)


def _why_not(q, k, q_weight, k_weight, norm, exact) -> str:
    if not CPU.loaded:
        return CPU.reason
    if not q.is_cpu:
        return "q is on a GPU" if q.is_cuda else f"q is on {q.device}"
    if exact and norm < reference.ROTATION and differs[norm]:
        return differs[norm]
    if not ((q_weight is None or q_weight.dtype is q.dtype) and (k_weight is None or k_weight.dtype is q.dtype)):
        return "a weight differs from q in dtype"
    if k.dtype is not q.dtype:  # as norms with weights of other dtypes leave them
        return "k differs from q in dtype"
    return ""


def why_not_rope(q, k, q_weight, k_weight, cos, sin, eps, norm, exact) -> str:
    return _why_not(q, k, q_weight, k_weight, norm, exact)


def why_not_into(q, k, q_weight, k_weight, q_out, k_out, cos, sin, eps, norm, exact) -> str:
    if any(x.dtype is not q.dtype for x in (q_out, k_out)):
        return "an output differs from q in dtype"
    return _why_not(q, k, q_weight, k_weight, norm, exact)


def why_not_backward(q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, eps, wanted) -> str:
    if q_grad.dtype is not q.dtype or k_grad.dtype is not q.dtype:
        return "a gradient differs from q in dtype"
    return _why_not(q, k, q_weight, k_weight, reference.RMS, False)
