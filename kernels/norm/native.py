"""What csrc/cpu/norm.cpp and global_response_norm.cpp serve: the predicates of the room's CPU rows."""

from __future__ import annotations

import torch

from fusewire.kernels.adaln.native import layer_norm_order
from fusewire.kernels.checks import FLOATS
from fusewire.kernels.dispatch import forced_backend
from fusewire.kernels.library import CPU
from fusewire.kernels.norm import reference
from fusewire.kernels.rounding import differs_from_stock, probe_values

MAX_DIMS = 9  # csrc/common/rows.h
# Whose exact layer norms are left to PyTorch's own, with which nothing is fused: ours take up to a sixth more there (benchmarks/results/xeon-avx512/test_norm.json)
LEFT_TO_PYTORCH = {torch.float32}
# Why exact rows stand down: (dtype, "diffusers" | "torch") for RMSNorm, (dtype, "layer" | "wide") for LayerNorm
_stands_down: dict[tuple[torch.dtype, str], str] = {}


def _differs(kind: str, op, meaning, dtype: torch.dtype, switch: bool) -> None:
    cases = []
    for width in (1, 5, 15, 40, 300, 1050, 1536):
        x, weight, bias = probe_values(1, width, dtype=dtype), *(probe_values(width, dtype=dtype, seed=seed) for seed in (2, 3))
        cases += [(x, *affine, 1e-6, switch, True) for affine in ((None, None), (weight, None), (weight, bias))]
        if dtype in reference.HALVES and meaning is reference.layer_norm:
            cases.append((x, weight.float(), bias.float(), 1e-6, switch, True))
    if reason := differs_from_stock(op, meaning, cases):
        _stands_down[dtype, kind] = reason


def compare_with_stock(rms_norm, layer_norm) -> None:
    """Find out, for each dtype and rounding, whether the two ops in exact mode and the installed torch agree."""
    if not CPU.loaded:
        return
    for dtype in FLOATS:
        _differs("diffusers", rms_norm, reference.rms_norm, dtype, False)
        _differs("torch", rms_norm, reference.rms_norm, dtype, True)
        for kind, summed in (("layer", dtype), ("wide", torch.float32)):
            if layer_norm_order(summed) is None:
                _stands_down[dtype, kind] = f"torch {torch.__version__} sums the rows of layer_norm in an order that the kernel does not know"
            elif kind == "layer" or dtype in reference.HALVES:
                _differs(kind, layer_norm, reference.layer_norm, dtype, kind == "wide")


def _why_not(x, weight, bias, mixed: bool = False) -> str:
    """``mixed``: a float32 weight or bias beside a 16-bit x is served."""
    if not CPU.loaded:
        return CPU.reason
    if not x.is_cpu:
        return "x is on a GPU" if x.is_cuda else f"x is on {x.device}"
    if x.dim() > MAX_DIMS:
        return f"x has more than {MAX_DIMS} dimensions"
    dtype = x.dtype
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype is not dtype and not (mixed and tensor.dtype is torch.float32 and dtype in reference.HALVES):
            return f"{name} has dtype {tensor.dtype}, x has {dtype}"
    return ""


def why_not_rms(x, weight, bias, eps, as_torch, exact) -> str:
    # A float32 bias, and with diffusers' rounding a float32 weight, makes the result float32
    if reason := _why_not(x, weight, bias, as_torch and (bias is None or bias.dtype is x.dtype)):
        return reason
    if not exact:
        return ""
    if x.numel() == x.shape[-1] >= 32768:
        return "torch splits the sum of one row this long between its threads"
    return _stands_down.get((x.dtype, "torch" if as_torch else "diffusers"), "")


def why_not_layer(x, weight, bias, eps, wide, exact) -> str:
    if exact and x.dtype in LEFT_TO_PYTORCH and x.is_contiguous() and forced_backend() != "cpu":
        return f"exact fuses nothing with a layer norm, and PyTorch's own is as fast in {x.dtype}"
    return _why_not_layer(x, weight, bias, wide, exact)


def _why_not_layer(x, weight, bias, wide: bool, exact: bool) -> str:
    if reason := _why_not(x, weight, bias, True):
        return reason
    if not exact:
        return ""
    if bias is not None and weight is None:
        return "torch rounds a layer norm with a bias but no weight in a way of its own"
    if wide and x.dtype is torch.float64:
        return "FP32LayerNorm computes float64 in float32"
    return _stands_down.get((x.dtype, "wide" if wide and x.dtype is not torch.float32 else "layer"), "")


def why_not_layer_2d(x, weight, bias, eps, exact) -> str:
    return _why_not_layer(x, weight, bias, False, exact)


def why_not_backward(grad, x, weight, eps, of_x, of_weight, of_bias) -> str:
    if grad.dtype is not x.dtype:
        return f"grad has dtype {grad.dtype}, x has {x.dtype}"
    return _why_not(x, weight, None)


def why_not_response(x, weight, bias, eps, exact) -> str:
    if exact:
        return "torch.norm sums in an order of its own"
    return _why_not(x, weight, bias)


def why_not_response_backward(grad, x, weight, eps, of_x) -> str:
    return why_not_backward(grad, x, weight, eps, of_x, True, True)
