"""Inputs for the tests of global response normalisation, and the stock module that the op stands for."""

from __future__ import annotations

import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from tests.kernels.norm.cases import leaves


def inputs(shape=(2, 5, 7, 35), dtype=torch.float32) -> dict:
    weight, bias = (torch.randn(shape[-1]).to(dtype) for _ in range(2))
    return {"x": (torch.randn(shape) * torch.rand(shape[-1]) + 0.1).to(dtype), "weight": weight, "bias": bias}


def call(v: dict, **keywords) -> torch.Tensor:
    return ops.global_response_norm(v["x"], v["weight"], v["bias"], **keywords)


def stock(v: dict, eps: float = 1e-6) -> torch.Tensor:
    """diffusers' GlobalResponseNorm, written out."""
    response = torch.norm(v["x"], p=2, dim=(1, 2), keepdim=True)
    response = response / (response.mean(dim=-1, keepdim=True) + eps)
    return v["weight"] * (v["x"] * response) + v["bias"] + v["x"]


def gradients(v: dict, grad=None, function=call, backward=None, **keywords) -> tuple[torch.Tensor, ...]:
    these, wanted = leaves(v)
    out = function(these, **keywords)
    with forced(backward):
        return torch.autograd.grad(out, wanted, torch.ones_like(out) if grad is None else grad)
