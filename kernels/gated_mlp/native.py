"""What csrc/cpu/gated_mlp.cpp serves: the predicates of the room's CPU rows."""

from __future__ import annotations

import torch

from fusewire.kernels.library import CPU

MAX_DIMS = 9  # csrc/common/rows.h
# PyTorch's GELU is oneDNN's where that is faster; its vectorised erf and exp differ in the last bits from the scalar ones with which it computes what
# does not fill a vector at the end of each thread's share. Stock's own result depends on the number of threads and on the batch.
EXACT = "numerics='exact' keeps PyTorch's own activation, whose bits depend on how it shares the elements between its threads"


def _serves(x, *tensors) -> str:
    if not CPU.loaded:
        return CPU.reason
    if not x.is_cpu:
        return "x is on a GPU" if x.is_cuda else f"x is on {x.device}"
    if x.dim() > MAX_DIMS:
        return f"x has more than {MAX_DIMS} dimensions"
    for tensor in tensors:
        if tensor.dtype is not x.dtype:
            return f"an argument has dtype {tensor.dtype}, x has {x.dtype}"
    return ""


def predicates(serves):
    """(why_not_forward, why_not_backward) of the room's ops, for a backend that ``serves(x, *tensors)``. The last argument forward is ``exact``."""
    def why_not_forward(x, *rest) -> str:
        return EXACT if rest[-1] else serves(x, *(value for value in rest if isinstance(value, torch.Tensor)))

    def why_not_backward(grad, x, *rest) -> str:
        return serves(x, grad, *(value for value in rest if isinstance(value, torch.Tensor)))

    return why_not_forward, why_not_backward


why_not_forward, why_not_backward = predicates(_serves)
