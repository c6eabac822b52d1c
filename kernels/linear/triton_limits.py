"""What triton_kernel.py and PyTorch's cuBLASLt epilogue serve: the predicates of the room's GPU rows."""

from __future__ import annotations

import torch

from fusewire.kernels.checks import autocasts, kind_of
from fusewire.kernels.dispatch import forced_backend
from fusewire.kernels.linear.native import recorded
from fusewire.kernels.triton_rows import why_not

MAX_BACKWARD_ROWS = 2**30  # numbered in 32 bits; the last program may count on beyond the rows


def trained(x, weight, bias, activation) -> bool:
    """Whether autograd records an activation whose backward pass, with the sum over rows that the bias gets, is one kernel."""
    return activation != "none" and recorded(x, weight, bias) and all(t is None or t.dtype is x.dtype for t in (weight, bias))


def _autocast(x) -> str:
    return "autocast is on" if autocasts(kind_of(x)) else ""


def why_not_epilogue(x, weight, bias, activation, gate, residual, exact) -> str:
    if exact and gate is None and residual is None:
        return "numerics='exact' leaves nothing to fuse: the stock calls round in between"
    if residual is None and activation == "none":
        return "there is nothing to fuse with the matrix product"
    if gate is None and residual is not None and (exact or forced_backend() != "triton"):
        return "a sum alone is one call already"
    if reason := why_not(x, weight, bias, gate, residual) or _autocast(x):
        return reason
    if x.dim() > 4:
        return f"x has {x.dim()} dimensions, more than 4"
    if x.numel() // max(x.shape[-1], 1) * weight.shape[0] >= 2**37:
        return "the result has 2^37 elements or more"
    if activation != "none" and forced_backend() != "triton" and not trained(x, weight, bias, activation):
        return "bias and activation in one pass save no memory traffic over the GEMM's own bias and PyTorch's activation"
    return ""


def why_not_cublaslt(x, weight, bias, activation, gate, residual, exact) -> str:
    if exact:
        return "numerics='exact' rounds between the product and the activation, as the stock calls do"
    if not x.is_cuda:
        return f"x is on {kind_of(x)}"
    if activation != "gelu_tanh" or bias is None:
        return "cuBLASLt's epilogue is bias and GELU-tanh"
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.dtype is weight.dtype is bias.dtype:  # in float32 its GELU errs seven times as much
        return f"the dtypes are {x.dtype}, {weight.dtype} and {bias.dtype}"
    if forced_backend() != "cuda" and trained(x, weight, bias, activation) and not why_not_epilogue(x, weight, bias, activation, gate, residual, exact):
        return "autograd records: the backward pass needs the product, which the epilogue leaves nowhere"
    return _autocast(x)


def cublaslt(x, weight, bias, activation, gate, residual, exact) -> torch.Tensor:
    """GELU-tanh(x @ weight.T + bias) with the epilogue on the float32 accumulator: PyTorch's own call, differentiable and traceable."""
    return torch.ops.aten._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True).view(*x.shape[:-1], weight.shape[0])


def why_not_bias_activation(y, bias, activation) -> str:
    return why_not(y, bias) or (f"y has {y.dim()} dimensions, more than 4" if y.dim() > 4 else "")


def why_not_bias_activation_backward(grad, y, bias, activation, of_bias) -> str:
    if reason := why_not(y, grad, bias):
        return reason
    if y.numel() > MAX_BACKWARD_ROWS * max(y.shape[-1], 1):
        return f"y has more than {MAX_BACKWARD_ROWS} rows"
    return ""
