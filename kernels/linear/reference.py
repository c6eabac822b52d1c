"""A linear layer with its epilogue in plain PyTorch: the meaning of the room's op.

``act(x @ weight.T + bias)`` or ``residual + gate * (x @ weight.T + bias)``; GELU: Hendrycks and Gimpel (2016), "Gaussian Error Linear Units".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels.autograd import over_rows
from fusewire.kernels.rounding import compute_dtype, promoted

ACTIVATIONS = {"gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "gelu": F.gelu, "silu": F.silu}

SLOPES = {"gelu_tanh": lambda grad, y: torch.ops.aten.gelu_backward(grad, y, approximate="tanh"), "gelu": torch.ops.aten.gelu_backward,
          "silu": torch.ops.aten.silu_backward}


def over_tokens(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A gate [B, N] of x [B, T, K] as [B, 1, N], and one without dimensions as [1]; any other stays."""
    if not gate.dim():
        return gate.view(1)
    return gate.unsqueeze(1) if gate.dim() == 2 and x.dim() == 3 else gate


def linear(x, weight, bias, activation: str, gate, residual, exact: bool) -> torch.Tensor:
    """The stock calls. ``exact``: each rounds; otherwise gate and residual are applied in float32 and rounded once."""
    y = F.linear(x, weight, bias)
    if activation != "none":
        y = ACTIVATIONS[activation](y)
    if residual is None:
        return y
    gate = None if gate is None else over_tokens(gate, x)
    if exact:
        return residual + (y if gate is None else gate * y)
    if gate is None:
        return residual + y  # computed in float32, rounded once
    wide = compute_dtype(y.dtype)
    return (residual.to(wide) + gate.to(wide) * y.to(wide)).to(promoted(residual.dtype, y, gate))


def bias_activation(y, bias, activation: str) -> torch.Tensor:
    """act(y + bias), rounded once."""
    wide = compute_dtype(y.dtype)
    return ACTIVATIONS[activation](y.to(wide) if bias is None else y.to(wide) + bias.to(wide)).to(y.dtype).contiguous()


def bias_activation_backward(grad, y, bias, activation: str, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of y and bias in the rounding of ``close``; that of the bias has no elements where it is not wanted."""
    wide, dtype = compute_dtype(y.dtype), y.dtype
    dy = SLOPES[activation](grad.to(wide), y.to(wide) if bias is None else y.to(wide) + bias.to(wide))
    dbias = over_rows(dy) if of_bias and bias is not None else dy.new_empty(0)
    return dy.to(dtype).contiguous(), dbias.to(dtype)


def linear_activated(x, weight, bias, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(act(y + bias), y) with y = x @ weight.T"""
    y = F.linear(x, weight)
    return bias_activation(y, bias, activation), y
