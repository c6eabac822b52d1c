"""Inputs for the adaln tests, and the stock code that the ops stand for, written out as diffusers' blocks write it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire import ops
from fusewire.kernels.dispatch import forced

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = ("adaln_modulate", "adaln_modulate_dual", "gate_residual", "gate_residual_adaln", "two_gates")
NORMED = ("adaln_modulate", "adaln_modulate_dual", "gate_residual_adaln")


def inputs(batch: int, tokens: int, channels: int, dtype=torch.float32, kind: str = "chunk") -> dict[str, torch.Tensor]:
    """x, y, y2 [B, T, C] and six modulations: chunks [B, C] of one projection, [B, 1, C] or per token [B, T, C]."""
    values = {name: (scale * torch.randn(batch, tokens, channels) + mean).to(dtype) for name, scale, mean in (("x", 1, 0.5), ("y", 2, 0), ("y2", 1, -1))}
    size = {"chunk": (batch,), "one": (batch, 1), "token": (batch, tokens)}[kind]
    chunks = torch.randn(*size, 6 * channels).to(dtype).chunk(6, dim=-1)
    return {**values, **dict(zip(("gate", "gate2", "shift", "scale", "shift2", "scale2"), chunks))}


def repeated(dtype, kind: str) -> dict[str, torch.Tensor]:
    """Two samples of 6 tokens with the same values, so that an expanded layout of each input exists."""
    v = inputs(2, 6, 35, dtype, kind)
    for tensor in v.values():
        tensor[1] = tensor[0]
    return v


def far_apart() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Three tokens [1, 3, 8] that lie 2^30 elements apart (memory that is never touched in between), to be filled, and inputs of that size."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    return torch.as_strided(base, (1, 3, 8), (1, 2**30, 1)), inputs(1, 3, 8, torch.bfloat16, "token")


def call(name: str, v: dict, **keywords) -> tuple[torch.Tensor, ...]:
    """The op's outputs as a tuple."""
    if name == "adaln_modulate":
        return (ops.adaln_modulate(v["x"], v["shift"], v["scale"], **keywords),)
    if name == "adaln_modulate_dual":
        return ops.adaln_modulate_dual(v["x"], v["shift"], v["scale"], v["shift2"], v["scale2"], **keywords)
    if name == "gate_residual":
        return (ops.gate_residual(v["x"], v["y"], v["gate"], **keywords),)
    second = {"y2": v["y2"], "gate2": v["gate2"]} if name == "two_gates" else {}
    return ops.gate_residual_adaln(v["x"], v["y"], v["gate"], v["shift"], v["scale"], **second, **keywords)


def used(name: str) -> tuple[str, ...]:
    """The tensor arguments of an op."""
    return {"adaln_modulate": ("x", "shift", "scale"), "adaln_modulate_dual": ("x", "shift", "scale", "shift2", "scale2"),
            "gate_residual": ("x", "y", "gate"), "gate_residual_adaln": ("x", "y", "gate", "shift", "scale"),
            "two_gates": ("x", "y", "gate", "y2", "gate2", "shift", "scale")}[name]


def op_name(name: str) -> str:
    return "gate_residual_adaln" if name == "two_gates" else name


def served(name: str) -> tuple[int, int]:
    """Calls of the op since the test began on (our CPU library, the reference)."""
    counts = ops.stats()[name]
    return counts["cpu"], counts["reference"]


def stock(name: str, v: dict, eps: float = 1e-6, weight=None, bias=None) -> tuple[torch.Tensor, ...]:
    """JointTransformerBlock's and SD35AdaLayerNormZeroX's arithmetic, one eager operation at a time."""
    def over(m):
        return m if m.dim() == 3 else m[:, None]

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def modulated(n, shift, scale):
        return n * (1 + over(scale)) + over(shift)

    x = v["x"]
    if name == "adaln_modulate":
        return (modulated(norm(x), v["shift"], v["scale"]),)
    if name == "adaln_modulate_dual":
        n = norm(x)
        return modulated(n, v["shift"], v["scale"]), modulated(n, v["shift2"], v["scale2"])
    r = x + over(v["gate"]) * v["y"]
    if name == "two_gates":
        r = r + over(v["gate2"]) * v["y2"]
    return (r,) if name == "gate_residual" else (r, modulated(norm(r), v["shift"], v["scale"]))


def affine_stock(norm: str):
    """``stock`` with a weight and a bias; with diffusers' RMSNorm in the place of the layer norm for "rms"."""
    def run(name: str, v: dict, weight=None, bias=None) -> tuple[torch.Tensor, ...]:
        if norm == "layer":
            return stock(name, v, weight=weight, bias=bias)
        residual = stock("gate_residual", v) if name == "gate_residual_adaln" else ()
        r = residual[0] if residual else v["x"]
        n = (r * torch.rsqrt(r.to(torch.promote_types(r.dtype, torch.float32)).pow(2).mean(-1, keepdim=True) + 1e-6)).to(r.dtype)
        n = n if weight is None else n * weight
        n = n if bias is None else n + bias
        pairs = (("shift", "scale"), ("shift2", "scale2"))[:2 if name == "adaln_modulate_dual" else 1]
        return (*residual, *(n * (1 + v[scale][:, None]) + v[shift][:, None] for shift, scale in pairs))
    return run


def wide(v: dict) -> dict:
    return {name: tensor.double() for name, tensor in v.items()}


def gradients(run, name: str, v: dict, grads=None, backend: str | None = None, wanted=None, **keywords) -> dict[str, torch.Tensor]:
    """The gradient of each tensor of ``v`` that the op uses (or of ``wanted``), for these gradients of its outputs (ones, unless given)."""
    v = {k: t.detach().requires_grad_(wanted is None or k in wanted) for k, t in v.items()}
    affine = {k: v[k] for k in ("weight", "bias") if k in v}
    names = wanted or (*used(name), *affine)
    outputs = run(name, v, **affine, **keywords)
    grads = [torch.ones_like(out) for out in outputs] if grads is None else [grad.to(out.dtype) for grad, out in zip(grads, outputs)]
    with forced(backend):
        return dict(zip(names, torch.autograd.grad(outputs, [v[k] for k in names], grads)))


def upstream(v: dict, name: str) -> list[torch.Tensor]:
    return [torch.randn_like(v["x"]) for _ in call(name, v)]


def with_affine(v: dict) -> dict:
    return {**v, **{name: torch.randn(v["x"].shape[-1]).to(v["x"].dtype) for name in ("weight", "bias")}}
