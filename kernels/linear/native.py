"""What serves ``close`` on the CPU: csrc/cpu/linear.cpp, or oneDNN's linear as PyTorch ships it.

Measured on a Zen 4 processor with two cores (GFLOP/s at [1024, 1536] x [1536, 6144] and back): float32 130 through MKL (``F.linear``), 160-170 here, 200
through oneDNN, whose sum in one chain errs up to four times as much as MKL's and so breaks the contract of ``close``; bfloat16 350-390 through
oneDNN (``F.linear`` runs the same product, without the activation), 290-360 here; float16 20-35 through ``F.linear``, 150 here.
"""

from __future__ import annotations

import torch

from fusewire.kernels.library import CPU, cpu_isa

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_BFLOAT16 = ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
POST_OPS = {"none": ("none", ""), "gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "silu": ("swish", "")}
MAX_DIMS = 9
ISA = cpu_isa()  # fixed for the process; read once, so that torch.compile sees a constant


def why_not_cpu(x, weight, bias, activation, gate, residual, exact) -> str:
    """The limits of both: why neither serves the call."""
    if exact:
        return "numerics='exact' keeps the stock matrix product"
    if not x.is_cpu:
        return f"x is on {x.device}"
    if x.dtype is torch.float64:
        return "x has dtype torch.float64"
    if any(t is not None and t.dtype is not x.dtype for t in (weight, bias, gate, residual)):
        return "the tensors differ in dtype"
    if x.numel() == 0 or weight.numel() == 0:
        return "a tensor is empty"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if onednn_serves(x, weight, residual):
        return ""
    if not CPU.loaded:
        return CPU.reason
    if ISA == "base":
        return "the processor has no AVX2"
    if x.dim() > MAX_DIMS:
        return f"x has {x.dim()} dimensions; at most {MAX_DIMS} are served"
    if activation == "gelu":
        return "the erf form of GELU has no kernel"
    if x.numel() == x.shape[-1]:
        return "x is one row"
    return ""


def onednn_serves(x, weight, residual) -> bool:
    """oneDNN is faster in bfloat16, and for one row, where reading the weight takes all the time."""
    if residual is not None or not torch.backends.mkldnn.enabled or not weight.is_contiguous():
        return False
    return ONEDNN_BFLOAT16 if x.dtype is torch.bfloat16 else ONEDNN and x.dtype is torch.float32 and x.numel() == x.shape[-1]


def onednn(x, weight, bias, activation: str) -> torch.Tensor:
    """act(x @ weight.T + bias): the activation is applied to the float32 sum, before the one rounding."""
    attr, algorithm = POST_OPS[activation]
    if bias is not None and bias.stride(0) != 1:  # mkldnn::_linear_pointwise reads a bias as if it were contiguous
        bias = bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)
