"""What csrc/cpu/gated_mlp.cpp serves: the predicates of the room's CPU rows."""

from __future__ import annotations

from fusewire.kernels.library import CPU

MAX_DIMS = 9  # csrc/common/rows.h
# PyTorch's GELU is oneDNN's where that is faster; its vectorised erf and exp differ in the last bits from the scalar ones with which it computes what
# does not fill a vector at the end of each thread's share. Stock's own result depends on the number of threads and on the batch.
EXACT = "numerics='exact' keeps PyTorch's own activation, whose bits depend on how it shares the elements between its threads"


def _why_not(x, *tensors) -> str:
    if not CPU.loaded:
        return CPU.reason
    if not x.is_cpu:
        return f"x is on {x.device}"
    if x.dim() > MAX_DIMS:
        return f"x has more than {MAX_DIMS} dimensions"
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not x.dtype:
            return f"an argument has dtype {tensor.dtype}, x has {x.dtype}"
    return ""


def why_not_geglu(x, gate, bias, exact) -> str:
    return EXACT if exact else _why_not(x, gate, bias)


def why_not_swiglu(x, gate, bias, gate_first, exact) -> str:
    return EXACT if exact else _why_not(x, gate, bias)


def why_not_quick_gelu(x, exact) -> str:
    return EXACT if exact else _why_not(x)


def why_not_backward(grad, x, gate, bias, *rest) -> str:
    return _why_not(x, grad, gate, bias)


def why_not_quick_gelu_backward(grad, x) -> str:
    return _why_not(x, grad)
