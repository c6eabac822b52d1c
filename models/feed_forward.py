"""Feed-forwards over diffusers' attribute names: a projection with GELU or GEGLU, a dropout, a projection."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fusewire import ops
from fusewire.models.layers import How, gated_linear, gated_sum, inactive, linear, plain_linear, product, takes, untouched

# Projections that a fused forward may read instead of calling. They grow by the stock classes that ``fusewire.swap`` has verified.
GELU_PROJECTIONS: set[type] = set()
GEGLU_PROJECTIONS: set[type] = set()


class GELUProjection(nn.Module):
    """Linear, then GELU in its tanh form, or with ``approximate="none"`` that of erf."""

    def __init__(self, channels: int, hidden: int, approximate: str = "tanh", bias: bool = True):
        super().__init__()
        self.approximate = approximate
        self.proj = nn.Linear(channels, hidden, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


GELU_PROJECTIONS.add(GELUProjection)


class GEGLUProjection(nn.Module):
    """Linear to two halves, ``first * gelu(second)`` with the GELU of erf (Shazeer, 2020)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.proj(x).chunk(2, dim=-1)
        return first * F.gelu(second)


GEGLU_PROJECTIONS.add(GEGLUProjection)


class FeedForward(nn.Module):
    """[B, T, C] -> [B, T, out_channels or C] through ``hidden`` channels; ``net`` as in diffusers: projection with GELU (in its tanh form, or
    ``approximate="none"``; ``gated``: GEGLU), dropout, projection."""

    takes_gate = True  # feed_forward_residual may run it together with the gate behind it

    def __init__(self, channels: int, hidden: int, how: How = How(), gated: bool = False, approximate: str = "tanh", out_channels: int | None = None,
                 bias: bool = True):
        super().__init__()
        self.how = how
        projection = GEGLUProjection(channels, hidden) if gated else GELUProjection(channels, hidden, approximate, bias)
        self.net = nn.ModuleList([projection, nn.Dropout(0.0), nn.Linear(hidden, out_channels or channels, bias=bias)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, output = feed_forward_hidden(self, x, self.how)
        return linear(output, hidden, self.how)


def feed_forward_hidden(module, x, how: How) -> tuple[torch.Tensor, nn.Module]:
    """-> (the input of the last projection, the last projection)."""
    projection, dropout, output = module.net if len(module.net) == 3 else (nn.Sequential(*module.net[:-1]), None, module.net[-1])
    if type(projection) in GELU_PROJECTIONS and projection.approximate == "tanh" and untouched(projection):
        x = linear(projection.proj, x, how, activation="gelu_tanh")
    elif type(projection) in GEGLU_PROJECTIONS and how.numerics == "close" and untouched(projection):
        x = _geglu(projection.proj, x, how)
    else:
        x = projection(x)
    return (x if dropout is None or inactive(dropout) else dropout(x)), output


def _geglu(projection: nn.Module, x: torch.Tensor, how: How) -> torch.Tensor:
    """``hidden * gelu(gate)`` of the halves of ``projection(x)``; the bias of a plain one is added on the way."""
    if how.linear and plain_linear(projection):
        return ops.geglu(product(x, projection.weight, None, how), bias=projection.bias, numerics=how.numerics)
    return ops.geglu(projection(x), numerics=how.numerics)


def feed_forward_residual(module, x, gate, residual, how: How) -> torch.Tensor:
    """``residual + gate * module(x)``, without a gate where it is None; it goes into the last projection where the feed-forward is ours and not
    observed."""
    if how.linear and takes(module, "takes_gate"):
        hidden, output = feed_forward_hidden(module, x, how)
        return gated_linear(output, hidden, gate, residual, how)
    return gated_sum(residual, module(x), gate, how)
