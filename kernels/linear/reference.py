"""A linear layer with its epilogue in plain PyTorch: the meaning of the room's op.

``act(x @ weight.T + bias)`` or ``residual + gate * (x @ weight.T + bias)``; GELU: Hendrycks and Gimpel (2016), "Gaussian Error Linear Units".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels.rounding import compute_dtype, promoted

ACTIVATIONS = {"gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "gelu": F.gelu, "silu": F.silu}


def over_tokens(gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A gate [B, N] of x [B, T, K] as [B, 1, N]; any other stays."""
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
    wide = compute_dtype(y.dtype)
    dtype = promoted(residual.dtype, y, gate)
    y = y.to(wide) if gate is None else gate.to(wide) * y.to(wide)
    return (residual.to(wide) + y).to(dtype)
