"""Inputs for the tests of gated activations, and the stock code that the ops stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Kind: (public op, its keywords, whether the gate is a tensor of its own)
KINDS = {
    "geglu": ("geglu", {}, False),
    "geglu-apart": ("geglu", {}, True),
    "swiglu": ("swiglu", {}, False),
    "swiglu-first": ("swiglu", {"gate_first": True}, False),
    "swiglu-apart": ("swiglu", {}, True),
    "quick_gelu": ("quick_gelu", {}, None),
}


def inputs(rows: int, width: int, dtype=torch.float32, kind: str = "geglu", bias: bool = True, batch: int = 2, spread: float = 3.0) -> dict:
    """x [B, T, 2F] (or [B, T, F] and a gate), bias [2F] or None; for quick GELU x [B, T, F], bias [F]. The gates reach into both tails of the activations."""
    apart = KINDS[kind][2]
    x = (spread * torch.randn(batch, rows, width if apart or apart is None else 2 * width)).to(dtype)
    return {"x": x, "gate": (spread * torch.randn(batch, rows, width)).to(dtype) if apart else None,
            "bias": torch.randn(width if apart is None else 2 * width).to(dtype) if bias else None}


def call(kind: str, v: dict, **keywords) -> torch.Tensor:
    name, own, apart = KINDS[kind]
    tensors = {"bias": v["bias"]} if apart is None else {"gate": v["gate"], "bias": v["bias"]}
    return getattr(ops, name)(v["x"], **tensors, **own, **keywords)


def served(kind: str, suffix: str = "") -> tuple[int, int]:
    """Calls of the op since the test began on (our CPU library, the reference)."""
    counts = ops.stats()[KINDS[kind][0] + suffix]
    return counts["cpu"], counts["reference"]


def stock(kind: str, v: dict) -> torch.Tensor:
    """What follows the projection in diffusers' GEGLU, SwiGLU, Flux2SwiGLU and ApproximateGELU, written out."""
    x, gate, bias = v["x"], v["gate"], v["bias"]
    if kind == "quick_gelu":
        y = x if bias is None else x + bias
        return y * torch.sigmoid(1.702 * y)
    if gate is not None:
        first, second = (x, gate) if bias is None else (x + bias[:x.shape[-1]], gate + bias[x.shape[-1]:])
    else:
        first, second = (x if bias is None else x + bias).chunk(2, dim=-1)
    if kind == "swiglu-first":
        return F.silu(first) * second
    return first * (F.gelu if kind.startswith("geglu") else F.silu)(second)


def wide(v: dict) -> dict:
    return {name: None if t is None else t.double() for name, t in v.items()}


def leaves(v: dict) -> tuple[dict, list[torch.Tensor]]:
    """The same memory as leaves of a graph, and those that are there."""
    v = {name: None if t is None else t.detach().requires_grad_() for name, t in v.items()}
    return v, [t for t in v.values() if t is not None]
