"""A sampler's step by csrc/cuda: the predicate of the room's CUDA row, and what it launches.

Every operation is elementwise, so that ``exact`` gives the bits of eager PyTorch on the same device.
"""

from __future__ import annotations

import torch

from fusewire.kernels import cuda_rows
from fusewire.kernels.sampler_step.reference import halves
from fusewire.kernels.triton_rows import FLOATS

MAX_DIMS = 8

op = cuda_rows.raw("cuda_flow_euler(Tensor sample, Tensor cond, Tensor? uncond, Tensor table, int step, Tensor? counter, Tensor(a!) out, bool exact)"
                   " -> ()")


def why_not_flow_euler(sample, model_output, uncond, table, step, counter, exact) -> str:
    if reason := cuda_rows.why_not(model_output, uncond):
        return reason
    if sample.dtype not in FLOATS:
        return f"sample has dtype {sample.dtype}"
    if sample.dim() > MAX_DIMS:
        return f"sample has {sample.dim()} dimensions, more than {MAX_DIMS}"
    if sample.numel() >= 2**31:
        return "sample has 2^31 elements or more"
    return ""


def flow_euler_step(sample, model_output, uncond, table, step: int, counter, exact: bool) -> torch.Tensor:
    cond, uncond = halves(model_output, uncond, sample.shape[0])
    out = sample.new_empty(sample.shape, dtype=cond.dtype)
    op(sample, cond, uncond, table, step, counter, out, exact)
    return out
