"""What the text encoders share: their activations, a projection followed by one, and a reader of transformers' configs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import nn

from fusewire import ops
from fusewire.models.configuration import StockConfig
from fusewire.models.layers import How, linear, plain_linear, untouched


class TransformersConfig(StockConfig):
    """Base of a config whose fields are those of a class of transformers. Its ``config.json`` has much that concerns generation and training:
    entries that are neither fields nor ``fixed`` have no effect here."""

    @classmethod
    def from_dict(cls, config: Mapping) -> StockConfig:
        """From the content of a ``config.json``, or ``model.config.to_dict()``. ValueError names a bad entry."""
        known = {field.name for field in fields(cls)} | set(cls.fixed)
        return super().from_dict({key: value for key, value in config.items() if key in known})


class QuickGELU(nn.Module):
    """CLIP's: ``x * sigmoid(1.702 x)``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class NewGELU(nn.Module):
    """The tanh form of GELU operation by operation, as transformers' ``gelu_new`` rounds it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


_MAKE = {"quick_gelu": QuickGELU, "gelu": nn.GELU, "gelu_new": NewGELU, "relu": nn.ReLU, "silu": nn.SiLU}
# Class -> what an instance of it computes: "quick_gelu", "gelu" (erf), "gelu_tanh", or "" for what we do not fuse. It grows by the stock classes that
# ``fusewire.swap`` has verified.
KINDS: dict[type, Callable[[nn.Module], str]] = {
    QuickGELU: lambda activation: "quick_gelu",
    NewGELU: lambda activation: "gelu_tanh",
    nn.GELU: lambda activation: "gelu" if activation.approximate == "none" else "gelu_tanh",
}


def activation_of(name: str) -> nn.Module:
    """By transformers' name; ValueError for one that no text encoder has."""
    if name not in _MAKE:
        raise ValueError(f"activation is {name!r}; it should be one of {', '.join(map(repr, _MAKE))}")
    return _MAKE[name]()


def activated(projection: nn.Module, activation: nn.Module, x: torch.Tensor, how: How) -> torch.Tensor:
    """``activation(projection(x))``: fused where linears may be, otherwise by calling both."""
    kind = KINDS[type(activation)](activation) if how.linear and type(activation) in KINDS and untouched(activation) else ""
    if kind == "gelu_tanh":
        return linear(projection, x, how, activation="gelu_tanh")
    # On the CPU the erf form is an epilogue of oneDNN's bfloat16 product alone
    if kind == "gelu" and plain_linear(projection) and (x.dtype is torch.bfloat16 or not x.is_cpu):
        return ops.linear(x, projection.weight, projection.bias, activation="gelu", numerics=how.numerics)
    y = linear(projection, x, how)
    return ops.quick_gelu(y, numerics=how.numerics) if kind == "quick_gelu" else activation(y)


def sdpa(q, k, v, mask, causal: bool, scale: float) -> torch.Tensor:
    """PyTorch's attention on [B, T, H, D] -> [B, T, H, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and q.shape[2] > 1, scale=scale).transpose(1, 2)
