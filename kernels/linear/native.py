"""oneDNN's linear, as PyTorch ships it: what it serves, and the call.

``mkldnn::_linear_pointwise`` takes the plain weight of an ``nn.Linear``; nothing is packed or converted. In float32 it is about twice as fast
as ``F.linear`` (which calls MKL) on AVX-512 processors of AMD; the activation is applied to the float32 accumulator before the one rounding.
"""

from __future__ import annotations

import torch

from fusewire.kernels.linear.reference import over_tokens
from fusewire.kernels.rounding import compute_dtype

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
BFLOAT16 = AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()
POST_OPS = {"none": ("none", ""), "gelu_tanh": ("gelu", "tanh"), "gelu": ("gelu", "none"), "silu": ("swish", "")}


def why_not_onednn(x, weight, bias, activation, gate, residual, exact) -> str:
    if exact:
        return "numerics='exact' keeps the stock matrix product"
    if not AVAILABLE:
        return "this torch was built without oneDNN"
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    if x.dtype is not torch.float32 and not (x.dtype is torch.bfloat16 and BFLOAT16):
        return f"x has dtype {x.dtype}"
    if weight.dtype is not x.dtype or (bias is not None and bias.dtype is not x.dtype):
        return "x, weight and bias differ in dtype"
    if x.numel() == 0 or weight.numel() == 0:
        return "a tensor is empty"
    if x.numel() < 32 * x.shape[-1]:
        return "x has fewer than 32 rows"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if not torch.backends.mkldnn.enabled:
        return "oneDNN is switched off (torch.backends.mkldnn.enabled)"
    return ""


def linear(x, weight, bias, activation: str, gate, residual, exact: bool) -> torch.Tensor:
    """act(x @ weight.T + bias), or residual + gate * (x @ weight.T + bias) with one rounding after the sum."""
    attr, algorithm = POST_OPS[activation]
    if bias is not None and bias.stride(0) != 1:  # mkldnn::_linear_pointwise reads a bias as if it were contiguous
        bias = bias.contiguous()
    weight = weight.contiguous()  # a plain nn.Linear's is; any other layout would sum in another order
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)
    if residual is None:
        return y
    if gate is None:
        return residual + y
    gate = over_tokens(gate, x)
    if y.dtype is torch.float32 and residual.dtype is torch.float32 and gate.dtype is torch.float32:
        return torch.addcmul(residual, gate, y)
    wide = compute_dtype(y.dtype)
    dtype = torch.promote_types(residual.dtype, torch.promote_types(y.dtype, gate.dtype))
    return torch.addcmul(residual.to(wide), gate.to(wide), y.to(wide)).to(dtype)
