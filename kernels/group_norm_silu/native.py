"""What csrc/cpu/group_norm_silu*.cpp serve: the predicates of the room's CPU rows.

``exact`` repeats what the installed torch does, down to the elements that its silu takes one by one; at import it is compared with torch and stands
down where the bits differ. Large channels-last pictures are summed by torch's threads, so they are compared at the first call that has one.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fusewire.kernels.adaln.native import layer_norm_order
from fusewire.kernels.checks import FLOATS
from fusewire.kernels.group_norm_silu import reference
from fusewire.kernels.library import CPU
from fusewire.kernels.rounding import differs_from_stock, probe_values

# (csrc/common/stock_order.h, whether the offset of channels-last pictures is a fused multiply-add), likeliest first
_ORDERS = ((2, True), (2, False), (1, True), (1, False), (0, False))
_SILU_STEPS = {torch.float32: (32, 16, 0), torch.float64: (16, 8, 0), torch.bfloat16: (32,), torch.float16: (32,)}  # two vectors of 64 or 32 bytes
LARGE = 1024  # pixels from which torch sums channels-last pictures by threads
_stands_down: dict[torch.dtype, str] = {}  # dtype -> why the exact rows do
_large: dict[torch.dtype, str] = {}  # the same for large channels-last pictures, once it is known


def _parameters(channels: int, dtype: torch.dtype, batch: int = 1) -> list[torch.Tensor]:
    """weight and bias [C]; shift, scale and add [B, C]."""
    values = [probe_values(batch, channels, dtype=dtype, seed=seed) for seed in (2, 3, 4, 5, 6)]
    return [values[0][0], values[1][0], *values[2:]]


def _small_cases(dtype: torch.dtype) -> list[tuple]:
    """One group of one sample each, so that no thread starts: every kind of tail, in both memory formats, with and without what is optional."""
    cases = []
    for channels, height, width in ((1, 1, 5), (3, 5, 7), (8, 6, 11), (10, 8, 8), (18, 7, 9), (40, 5, 13), (6, 31, 29), (600, 2, 2)):
        weight, bias, shift, scale, add = _parameters(channels, dtype)
        x = probe_values(1, channels, height, width, dtype=dtype)
        for picture in (x, x.contiguous(memory_format=torch.channels_last)):
            cases += [(picture, 1, None, None, 1e-5, None, None, None, False, True), (picture, 1, weight, bias, 1e-6, None, None, None, False, True),
                      (picture, 1, weight, None, 1e-5, shift, scale, add, False, True)]
            # A bias that cancels mean * factor to its last bits: where x is 0, what is left tells a fused multiply-add from two roundings
            picture = picture + 1
            picture[..., 0, 0] = 0
            cancelling = -torch.group_norm(picture, 1, weight, None, 1e-5)[0, :, 0, 0]
            cases.append((picture, 1, weight, cancelling, 1e-5, None, None, None, False, True))
    return cases


def _silu_cases(dtype: torch.dtype) -> list[tuple]:
    """Lengths that leave every remainder: what torch's silu does one by one differs from its vectors in some of the elements only."""
    return [(probe_values(1, 1, 1024 + length, dtype=dtype, seed=0.1 * length), 1, None, None, 1e-5, None, None, None, True, True)
            for length in (*range(31, 0, -2), *range(15, 0, -2), 31, 31, 15, 15)]


def compare_with_stock(op) -> None:
    """Find out, for each dtype, how the installed torch sums and exponentiates, and whether ``op`` in exact mode agrees with it."""
    if not CPU.loaded:
        return
    for dtype in FLOATS:
        empty, step = torch.empty(0, dtype=dtype), 0
        small, by_length = _small_cases(dtype), _silu_cases(dtype)
        # Layer norm's order first, which its statistics show: here rounding to 16 bits hides the difference of two orders in all but a few elements
        # of a million.
        of_layer_norm = layer_norm_order(dtype)
        for order in sorted(_ORDERS, key=lambda order: order[0] != of_layer_norm):
            torch.ops.fusewire.cpu_group_norm_order(empty, *order, step)
            if not (reason := differs_from_stock(op, reference.group_norm_silu, small)):
                break
        for step in () if reason else _SILU_STEPS[dtype]:
            torch.ops.fusewire.cpu_group_norm_order(empty, *order, step)
            if not (reason := differs_from_stock(op, reference.group_norm_silu, by_length)):
                break
        if reason:
            _stands_down[dtype] = reason


def _large_differs(dtype: torch.dtype) -> str:
    """Why a large channels-last picture is not exact here, or ``""``; with this many threads, as they decide the order."""
    if dtype not in _large:
        with torch.no_grad(), _disable_current_modes(), torch.autocast("cpu", enabled=False):
            cases = []
            for batch, channels, groups, height, width in ((1, 6, 2, 32, 33), (2, 24, 3, 40, 41)):
                weight, bias, shift, scale, add = _parameters(channels, dtype, batch)
                x = probe_values(batch, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
                cases += [(x, groups, None, None, 1e-5, None, None, None, True, True), (x, groups, weight, bias, 1e-6, shift, scale, add, True, True)]
            _large[dtype] = differs_from_stock(torch.ops.fusewire.group_norm_silu.default, reference.group_norm_silu, cases)
    return _large[dtype]


_large_differs._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import torch._dynamo and with it Triton


def _is_large(x: torch.Tensor) -> bool:
    """Whether torch takes x for channels-last and sums it by threads."""
    return x.numel() >= LARGE * x.shape[0] * x.shape[1] and reference.suggest_memory_format(x) is not torch.contiguous_format


def why_not(x, groups, weight, bias, eps, shift, scale, add, silu, exact) -> str:
    dtype = x.dtype
    if (x.is_cpu and CPU.loaded and (weight is None or weight.dtype is dtype) and (bias is None or bias.dtype is dtype)
            and (add is None or add.dtype is dtype) and shift is None and scale is None
            and not (exact and (_stands_down or (weight is None and bias is not None) or not x.is_contiguous()))):
        return ""
    if not CPU.loaded:
        return CPU.reason
    if not x.is_cpu:
        return "x is on a GPU" if x.is_cuda else f"x is on {x.device}"
    for name, tensor in (("weight", weight), ("bias", bias), ("shift", shift), ("scale", scale), ("add", add)):
        if tensor is not None and tensor.dtype is not dtype:
            return f"{name} has dtype {tensor.dtype}, x has {dtype}"
    if not exact:
        return ""
    if dtype in _stands_down:
        return _stands_down[dtype]
    if weight is None and bias is not None:
        return "torch rounds a group norm with a bias but no weight in a way of its own"
    if add is not None and 0 in x.stride():
        return "PyTorch lays out the sum of an expanded x in an order of its own"
    reason = _large_differs(dtype)
    return reason if reason and _is_large(x) else ""  # in this order: where there is no reason, a graph needs no guard on the size


def why_not_backward(grad, x, groups, weight, bias, eps, shift, scale, add, silu, of_x) -> str:
    if grad.dtype is not x.dtype:
        return f"grad has dtype {grad.dtype}, x has {x.dtype}"
    return why_not(x, groups, weight, bias, eps, shift, scale, add, silu, False)
