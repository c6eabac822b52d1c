"""Inputs for the norm tests, and the stock modules that the ops stand for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusewire import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Kind: (public op, its keywords)
KINDS = {
    "rms": ("rms_norm", {"rounding": "diffusers"}),
    "rms-torch": ("rms_norm", {"rounding": "torch"}),
    "layer": ("layer_norm", {"rounding": "torch"}),
    "layer-float32": ("layer_norm", {"rounding": "float32"}),
    "layer-2d": ("layer_norm_2d", {}),
}
AFFINE = {"plain": (False, False), "weight": (True, False), "weight-bias": (True, True)}


def _narrowed(kind, dtype, numerics="exact", **_) -> bool:
    return kind == "layer-float32" and dtype is torch.float64 and numerics == "exact"


NARROWED = pytest.mark.on_reference(when=_narrowed, reason="FP32LayerNorm computes float64 in float32")


def inputs(rows: int, channels: int, dtype=torch.float32, kind: str = "layer", affine: str = "weight-bias", batch: int = 2) -> dict:
    """x [B, T, C] ([B, C, T, 1] for pictures), weight and bias [C] or None."""
    shape = (batch, channels, rows, 1) if kind == "layer-2d" else (batch, rows, channels)
    weight, bias = (torch.randn(channels).to(dtype) if wanted else None for wanted in AFFINE[affine])
    return {"x": (1.5 * torch.randn(shape) + 0.5).to(dtype), "weight": weight, "bias": bias}


def call(kind: str, v: dict, eps: float = 1e-6, **keywords) -> torch.Tensor:
    name, own = KINDS[kind]
    return getattr(ops, name)(v["x"], v["weight"], v["bias"], eps=eps, **own, **keywords)


def served(kind: str, suffix: str = "") -> tuple[int, int]:
    """Calls of the op since the test began on (our CPU library, the reference)."""
    name = KINDS[kind][0] + suffix
    counts = ops.stats()[name]
    return counts["cpu"], counts["reference"]


def stock(kind: str, v: dict, eps: float = 1e-6) -> torch.Tensor:
    """diffusers' RMSNorm, torch.nn.RMSNorm (and a bias), torch.nn.LayerNorm, diffusers' FP32LayerNorm and WuerstchenLayerNorm, written out."""
    x, weight, bias = v["x"], v["weight"], v["bias"]
    if kind == "rms":
        y = x * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + eps)
        y = y.to(x.dtype) if weight is None else (y.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else y) * weight
        return y if bias is None else y + bias
    if kind == "rms-torch":
        y = F.rms_norm(x, x.shape[-1:], weight, eps)
        return y if bias is None else y + bias
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if kind == "layer-float32":
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], weight, bias, eps).permute(0, 3, 1, 2)


def true(kind: str, v: dict, eps: float = 1e-6) -> torch.Tensor:
    """The result in float64, where no stock module would round to less."""
    x, weight, bias = v["x"], v["weight"], v["bias"]
    if kind == "layer-2d":
        x = x.permute(0, 2, 3, 1)
    y = x if kind.startswith("rms") else x - x.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.permute(0, 3, 1, 2) if kind == "layer-2d" else y


def wide(v: dict) -> dict:
    return {name: None if t is None else t.double() for name, t in v.items()}


def leaves(v: dict) -> tuple[dict, list[torch.Tensor]]:
    """The same values as leaves of a graph, and those that are there."""
    v = {name: None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for name, t in v.items()}
    return v, [t for t in v.values() if t is not None]


def well_conditioned(x: torch.Tensor) -> None:
    """In place: no row's deviation is small against its values."""
    x[..., :1], x[..., 1:2] = 2, -1


def terms(kind: str, v: dict, grad: torch.Tensor, eps: float) -> dict[str, torch.Tensor | None]:
    """What the gradients are sums of, in float64, one row a term: each rounds in proportion to them (``assert_within``)."""
    x, grad = ((t.movedim(1, -1) if kind == "layer-2d" else t).flatten(0, -2).double() for t in (v["x"], grad))
    centred = x if kind.startswith("rms") else x - x.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    return {"x": None, "weight": grad * normed, "bias": grad}
