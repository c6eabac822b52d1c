"""GroupNorm with SiLU in plain PyTorch: the meaning of the room's ops.

Wu and He, "Group Normalization" (2018). Ho, Jain and Abbeel, "Denoising Diffusion Probabilistic Models" (2020): SiLU behind every norm and the time
embedding added before the second. Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis" (2021), AdaGN: ``norm * (1 + scale) + shift``.
``exact`` is eager PyTorch's arithmetic, operation by operation; otherwise float32 inside (float64 for float64) and one rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch._prims_common import suggest_memory_format

from fusewire.kernels.rounding import compute_dtype, promoted


def over_pixels(parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[B, C] -> [B, C, 1, ...] with as many dimensions as x."""
    return parameter.reshape(parameter.shape[:2] + (1,) * (x.dim() - 2))


def group_norm_silu(x, groups: int, weight, bias, eps: float, shift, scale, add, silu: bool, exact: bool) -> torch.Tensor:
    """silu(group_norm(x + add) * (1 + scale) + shift) for x [B, C, ...]; shift, scale, add [B, C] or [B, C, 1, ...]."""
    # a group norm keeps its input's dtype, the sums and the product promote
    dtype, memory_format = promoted(x.dtype, add, scale, shift), suggest_memory_format(x)
    if not exact:
        wide = compute_dtype(dtype)
        x, weight, bias, shift, scale, add = (None if t is None else t.to(wide) for t in (x, weight, bias, shift, scale, add))
    if memory_format is not torch.contiguous_format and _would_crash(x, weight, bias):
        x = _TakesPart.apply(x, weight, bias)
    y = x if add is None else x + over_pixels(add, x)
    y = torch.group_norm(y, groups, weight, bias, eps) if y.numel() else y
    if scale is not None:
        y = y * (1 + over_pixels(scale, x))
    if shift is not None:
        y = y + over_pixels(shift, x)
    y = F.silu(y) if silu else y
    return y.to(dtype).contiguous(memory_format=memory_format)


class _TakesPart(torch.autograd.Function):
    """x itself, as if it depended on the parameters: it then gets a gradient wherever one of them does, which goes nowhere."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return None, None, None


def _would_crash(x, weight, bias) -> bool:
    """Whether torch 2.13's channels-last backward would end the process: it does where x wants no gradient and a parameter does."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.requires_grad or torch._C._are_functorch_transforms_active():
        return False
    return any(t is not None and t.requires_grad for t in (weight, bias))


def group_norm_silu_backward(grad, x, groups: int, weight, bias, eps: float, shift, scale, add, silu: bool, of_x: bool) -> tuple[torch.Tensor, ...]:
    """The gradients of ``close`` for x (where ``of_x``), weight, bias, shift, scale and add, each empty where there is none."""
    # x always takes part: torch 2.13's channels-last backward ends the process where it does not
    given = [t if t is None else t.detach().requires_grad_() for t in (x, weight, bias, shift, scale, add)]
    with torch.enable_grad():
        out = group_norm_silu(given[0], groups, *given[1:3], eps, *given[3:], silu, False)
    found = iter(torch.autograd.grad(out, [t for t in given if t is not None], grad, allow_unused=True, materialize_grads=True))
    found = [x.new_empty(0) if t is None else next(found) for t in given]
    found[0] = found[0].contiguous(memory_format=suggest_memory_format(x)) if of_x else x.new_empty(0)
    return tuple(t if i < 3 or not t.numel() else t.reshape(t.shape[:2]).contiguous() for i, t in enumerate(found))
