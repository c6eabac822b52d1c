"""What csrc/cpu/adaln.cpp serves: the predicates of the room's CPU rows.

A predicate runs at every call. It first tests, on attributes alone, whether everything is as it should be, and looks for the reason only where not.
"""

from __future__ import annotations

import functools

import torch

from fusewire.kernels.adaln import reference
from fusewire.kernels.checks import FLOATS
from fusewire.kernels.library import CPU
from fusewire.kernels.rounding import differs_from_stock, probe_values

# csrc/common/stock_order.h, likeliest first: fused_plain_tail, fused, portable
_ORDERS = (2, 1, 0)
# Tails beside no or one vector, many of each, because the compilers that built PyTorch differ in whether they fuse a tail's multiply-adds, which
# shows in few of the rows; then one and several vectors, chunks of 16 vectors, and steps of the cascade.
_WIDTHS = (*(1, 2, 3, 6, 7, 11, 13, 15) * 8, 16, 31, 64, 100, 131, 255, 300, 1100, 1536, 2311, 4613)
stands_down: dict[tuple[torch.dtype, bool], str] = {}  # (dtype, rms) -> why the exact rows do


def _order_agrees(dtype: torch.dtype, order: int) -> bool:
    """Whether our layer-norm statistics in this order and the installed torch's are the same bit for bit."""
    values = probe_values(1, sum(_WIDTHS), dtype=dtype) + 1
    weight, bias = (fill(max(_WIDTHS), dtype=torch.promote_types(dtype, torch.float32)) for fill in (torch.ones, torch.zeros))
    begin = 0
    for width in _WIDTHS:
        x = values[:, begin:begin + width].contiguous()  # one row: no parallel region starts
        begin += width
        # With float32 weights, torch returns the statistics of 16-bit rows in float32
        stock = torch.native_layer_norm(x, (width,), weight[:width], bias[:width], 1e-6)[1:]
        if not torch.equal(_moments(x, order), torch.cat(stock, -1)):
            return False
    return True


@functools.cache
def layer_norm_order(dtype: torch.dtype) -> int | None:
    """The order of summation that the installed torch's layer norm has, if we know it: exact calls of every room follow it from then on."""
    for order in _ORDERS:
        if _order_agrees(dtype, order):
            torch.ops.fusewire.cpu_layer_norm_order(torch.empty(0, dtype=dtype), order)
            return order
    return None


def _moments(x: torch.Tensor, order: int) -> torch.Tensor:
    out = x.new_empty((x.shape[0], 2), dtype=torch.promote_types(x.dtype, torch.float32))
    torch.ops.fusewire.cpu_layer_norm_moments(x, 1e-6, order, out)
    return out


def compare_with_stock(op) -> None:
    """Find out, for each dtype and norm, whether ``op`` (adaln_modulate) in exact mode and the installed torch agree."""
    if not CPU.loaded:
        return
    for dtype in FLOATS:
        known = layer_norm_order(dtype) is not None
        for rms in (False, True):
            if not known and not rms:
                stands_down[dtype, rms] = f"torch {torch.__version__} sums the rows of layer_norm in an order that the kernel does not know"
                continue
            cases = []
            for width in (5, 40, 300, 1536):
                vectors = [probe_values(1, width, dtype=dtype, seed=seed) for seed in (2, 3, 4, 5)]
                for weight, bias in ((None, None), (vectors[2][0], vectors[3][0]), (vectors[2][0], None)):
                    cases.append((probe_values(1, 1, width, dtype=dtype), vectors[0], vectors[1], weight, bias, 1e-6, rms, True))
            reason = differs_from_stock(op, reference.adaln_modulate, cases)
            if reason:
                stands_down[dtype, rms] = reason


def _why_not(x, rms: bool, exact: bool, named) -> str:
    if not CPU.loaded:
        return CPU.reason
    if not x.is_cpu:
        return "x is on a GPU" if x.is_cuda else f"x is on {x.device}"
    for name, tensor in named:
        if tensor is not None and tensor.dtype is not x.dtype:
            return f"{name} has dtype {tensor.dtype}, x has {x.dtype}"
    if exact and rms and x.shape[0] * x.shape[1] == 1 and x.shape[2] >= 32768:
        return "torch splits the sum of one row this long between its threads"
    if exact and not rms and dict(named).get("weight", x) is None and dict(named).get("bias") is not None:
        return "torch rounds a layer norm with a bias but no weight in a way of its own"
    return stands_down.get((x.dtype, rms), "") if exact else ""


def why_not_modulate(x, shift, scale, weight, bias, eps, rms, exact) -> str:
    dtype = x.dtype
    if (x.is_cpu and shift.dtype is dtype and scale.dtype is dtype and weight is None and bias is None and not rms and not stands_down
            and CPU.loaded):
        return ""
    return _why_not(x, rms, exact, (("shift", shift), ("scale", scale), ("weight", weight), ("bias", bias)))


def why_not_modulate_dual(x, shift, scale, shift2, scale2, weight, bias, eps, rms, exact) -> str:
    dtype = x.dtype
    if (x.is_cpu and shift.dtype is dtype and scale.dtype is dtype and shift2.dtype is dtype and scale2.dtype is dtype and weight is None and bias is None
            and not rms and not stands_down and CPU.loaded):
        return ""
    return _why_not(x, rms, exact, (("shift", shift), ("scale", scale), ("shift2", shift2), ("scale2", scale2), ("weight", weight), ("bias", bias)))


def why_not_gate(x, y, gate, exact) -> str:
    if x.is_cpu and y.dtype is x.dtype and gate.dtype is x.dtype and CPU.loaded:
        return ""
    return _why_not(x, False, False, (("y", y), ("gate", gate)))


def why_not_gate_modulate(x, y, gate, y2, gate2, shift, scale, weight, bias, eps, rms, exact) -> str:
    dtype = x.dtype
    if (x.is_cpu and y.dtype is dtype and gate.dtype is dtype and shift.dtype is dtype and scale.dtype is dtype
            and (y2 is None or (y2.dtype is dtype and gate2.dtype is dtype)) and weight is None and bias is None and not rms and not stands_down
            and CPU.loaded):
        return ""
    return _why_not(x, rms, exact, (("y", y), ("gate", gate), ("y2", y2), ("gate2", gate2), ("shift", shift), ("scale", scale),
                                    ("weight", weight), ("bias", bias)))


def _why_not_gradient(**tensors) -> str:
    """One dtype throughout, on the CPU."""
    if not CPU.loaded:
        return CPU.reason
    (first, like), *rest = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    if not like.is_cpu:
        return f"{first} is on {like.device}"
    return next((f"{name} has dtype {tensor.dtype}, {first} has {like.dtype}" for name, tensor in rest if tensor.dtype is not like.dtype), "")


def why_not_modulate_backward(grad, x, shift, scale, weight, bias, eps, rms, wanted) -> str:
    return _why_not_gradient(x=x, grad=grad, shift=shift, scale=scale, weight=weight, bias=bias)


def why_not_modulate_dual_backward(grad, grad2, x, shift, scale, shift2, scale2, weight, bias, eps, rms, wanted) -> str:
    return _why_not_gradient(x=x, grad=grad, grad2=grad2, shift=shift, scale=scale, shift2=shift2, scale2=scale2, weight=weight, bias=bias)


def why_not_gate_backward(grad, y, gate, wanted) -> str:
    return _why_not_gradient(y=y, grad=grad, gate=gate)


def why_not_gate_modulate_backward(grad, grad2, x, y, gate, y2, gate2, shift, scale, weight, bias, eps, rms, wanted) -> str:
    return _why_not_gradient(x=x, grad=grad, grad2=grad2, y=y, gate=gate, y2=y2, gate2=gate2, shift=shift, scale=scale, weight=weight, bias=bias)
