"""What triton_kernel.py and PyTorch's cuBLASLt epilogue serve: the predicates of the room's GPU rows."""

from __future__ import annotations

import torch

from fusewire.kernels.dispatch import forced_backend
from fusewire.kernels.triton_rows import why_not


def _autocast(x) -> str:
    return "autocast is on" if torch.is_autocast_enabled(x.device.type) else ""


def why_not_epilogue(x, weight, bias, activation, gate, residual, exact) -> str:
    if exact and gate is None and residual is None:
        return "numerics='exact' leaves nothing to fuse: the stock calls round in between"
    if reason := why_not(x, weight, bias, gate, residual) or _autocast(x):
        return reason
    if x.dim() > 4:
        return f"x has {x.dim()} dimensions, more than 4"
    if x.numel() // max(x.shape[-1], 1) * weight.shape[0] >= 2**37:
        return "the result has 2^37 elements or more"
    if activation == "none" and residual is None:
        return "there is nothing to fuse with the matrix product"
    if exact and gate is None:
        return "a sum alone is one call already"
    if activation != "none" and forced_backend() != "triton":
        return "bias and activation in one pass save no memory traffic over the GEMM's own bias and PyTorch's activation"
    return ""


def why_not_cublaslt(x, weight, bias, activation, gate, residual, exact) -> str:
    if exact:
        return "numerics='exact' rounds between the product and the activation, as the stock calls do"
    if not x.is_cuda:
        return f"x is on {x.device.type}"
    if activation != "gelu_tanh" or bias is None:
        return "cuBLASLt's epilogue is bias and GELU-tanh"
    if x.dtype not in (torch.bfloat16, torch.float16) or not x.dtype is weight.dtype is bias.dtype:  # in float32 its GELU errs seven times as much
        return f"the dtypes are {x.dtype}, {weight.dtype} and {bias.dtype}"
    return _autocast(x)


def cublaslt(x, weight, bias, activation, gate, residual, exact) -> torch.Tensor:
    """GELU-tanh(x @ weight.T + bias) with the epilogue on the float32 accumulator: PyTorch's own call, differentiable and traceable."""
    return torch.ops.aten._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True).view(*x.shape[:-1], weight.shape[0])
