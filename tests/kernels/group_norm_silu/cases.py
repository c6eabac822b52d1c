"""Inputs for the group_norm_silu tests, and the stock code that the op stands for, written out as diffusers' ResnetBlock2D writes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = ("contiguous", "channels_last")
# (dtype, shape, groups) for csrc/cuda: channels-last pixels of more chunks than a block has threads, and fewer pixels than it has rows
MANY_CHANNELS = [(torch.bfloat16, (1, 2560, 3, 5), 32), (torch.bfloat16, (1, 4096, 1, 2), 8), (torch.float32, (1, 2048, 2, 2), 8),
                 (torch.float32, (1, 1028, 2, 3), 4)]
# What may be given beside x and groups: as VAE and U-Net blocks do, AdaGN, and everything at once
OPTIONS = {
    "plain": (), "affine": ("weight", "bias"), "weight": ("weight",), "add": ("weight", "bias", "add"), "adagn": ("weight", "bias", "shift", "scale"),
    "scale": ("scale",), "shift": ("weight", "shift"), "all": ("weight", "bias", "shift", "scale", "add"),
}


def in_format(x: torch.Tensor, memory_format: str) -> torch.Tensor:
    if memory_format == "contiguous" or x.dim() < 4:
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


def inputs(shape, dtype=torch.float32, options: str = "all", memory_format: str = "contiguous") -> dict[str, torch.Tensor]:
    """x, and the parameters that ``options`` names: weight and bias [C], chunks [B, C] of one projection."""
    batch, channels = shape[:2]
    every = {"x": in_format((1.5 * torch.randn(shape) + 0.5).to(dtype), memory_format), "weight": (1 + 0.3 * torch.randn(channels)).to(dtype),
             "bias": torch.randn(channels).to(dtype)}
    every |= dict(zip(("shift", "scale", "add"), (0.7 * torch.randn(batch, 3 * channels)).to(dtype).chunk(3, 1)))
    return {name: every[name] for name in ("x", *OPTIONS[options])}


def call(v: dict, groups: int, **keywords) -> torch.Tensor:
    return ops.group_norm_silu(v["x"], groups, **{name: tensor for name, tensor in v.items() if name != "x"}, **keywords)


def stock(v: dict, groups: int, eps: float = 1e-5, silu: bool = True) -> torch.Tensor:
    """One eager operation at a time."""
    def over(m):
        return m.reshape(m.shape[:2] + (1,) * (v["x"].dim() - 2))

    y = v["x"] + over(v["add"]) if "add" in v else v["x"]
    y = F.group_norm(y, groups, v.get("weight"), v.get("bias"), eps)
    y = y * (1 + over(v["scale"])) if "scale" in v else y
    y = y + over(v["shift"]) if "shift" in v else y
    return F.silu(y) if silu else y


def wide(v: dict) -> dict:
    return {name: tensor.double() for name, tensor in v.items()}


def leaves(v: dict) -> dict:
    return {name: tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for name, tensor in v.items()}


def gradients(run, v: dict, groups: int, grad: torch.Tensor, wanted=(), **keywords) -> dict[str, torch.Tensor]:
    """Of the tensors of ``v``, or of those ``wanted``, as they lie: no leaf is a copy."""
    these = {name: tensor.detach().requires_grad_(not wanted or name in wanted) for name, tensor in v.items()}
    names = [name for name, leaf in these.items() if leaf.requires_grad]
    return dict(zip(names, torch.autograd.grad(run(these, groups, **keywords), [these[name] for name in names], grad.to(v["x"].dtype))))


def served(op: str = "group_norm_silu") -> tuple[int, int]:
    """Calls since the test began on (our CPU library, the reference)."""
    counts = ops.stats()[op]
    return counts["cpu"], counts["reference"]
