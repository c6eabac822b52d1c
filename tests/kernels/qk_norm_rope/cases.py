"""Inputs for the tests of QK norm's gradients, and the eager chain that they stand for."""

from __future__ import annotations

import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.qk_norm_rope import reference
from tests.tolerance import assert_close, assert_within

NAMES = ("q", "k", "q_weight", "k_weight")


def inputs(batch: int, tokens: int, heads: int, dim: int, dtype=torch.float32, rotated: bool = False, k_heads: int = 0, k_tokens: int = 0) -> dict:
    """q and k [B, T, H, D], two weights [D], and gradients of both results; k may have its own heads and tokens."""
    k_shape = batch, k_tokens or tokens, k_heads or heads, dim
    v = {"q": torch.randn(batch, tokens, heads, dim), "k": 2 * torch.randn(k_shape) + 1, "q_weight": torch.randn(dim), "k_weight": torch.randn(dim),
         "q_grad": torch.randn(batch, tokens, heads, dim), "k_grad": torch.randn(k_shape)}
    angle = torch.randn(tokens, dim // 2)
    return {name: t.to(dtype) for name, t in v.items()} | {"rope": (angle.cos(), angle.sin()) if rotated else None}


def gradients(v: dict, backend: str | None = None, names=NAMES, **options) -> dict[str, torch.Tensor]:
    these = {k: t.detach().requires_grad_(k in names) if k in NAMES and t is not None else t for k, t in v.items()}
    outputs = ops.qk_norm_rope(*(these[k] for k in NAMES), rope=v["rope"], **{"numerics": "close", **options})
    names = [k for k in names if v[k] is not None]
    with forced(backend):
        return dict(zip(names, torch.autograd.grad(outputs, [these[k] for k in names], [v["q_grad"], v["k_grad"]])))


def once_wide(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``apply_rotary_emb`` on x in float32, so that the gradients of its two products are added there (diffusers rounds each to 16 bits)."""
    return reference.rotate(x.to(torch.promote_types(x.dtype, torch.float32)), cos, sin).to(x.dtype)


def plain(v: dict, eps: float = 1e-6, turn=once_wide) -> dict[str, torch.Tensor]:
    """The gradients of diffusers' RMSNorm and apply_rotary_emb, one eager operation at a time (in float64 where the values are)."""
    these = {k: v[k].detach().requires_grad_() for k in NAMES}

    def one(x, weight):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = (x * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype) * weight
        return y if v["rope"] is None else turn(y, *v["rope"])

    outputs = one(these["q"], these["q_weight"]), one(these["k"], these["k_weight"])
    return dict(zip(NAMES, torch.autograd.grad(outputs, [these[k] for k in NAMES], [v["q_grad"], v["k_grad"]])))


def wide(v: dict) -> dict:
    return {k: t if k == "rope" else t.double() for k, t in v.items()}


def check(backward, v: dict) -> None:
    """Every gradient keeps the rule of close against eager PyTorch's; the weights' have too few elements for its statistics."""
    got, stock = backward(v), plain(v)
    for name, want in plain(wide(v)).items():
        if name in ("q", "k"):
            assert_close(got[name], want, stock[name], name)
        else:
            assert_within(got[name], want, 4, name)
