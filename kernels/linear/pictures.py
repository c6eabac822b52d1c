"""What both ways to convolve by a product share: sizes, and which convolutions they may serve at all."""

from __future__ import annotations

import math

import torch

from fusewire.kernels.dispatch import transformed
from fusewire.kernels.linear import native


def out_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Pixels of a convolution's result along one side."""
    return (size + 2 * padding - kernel) // stride + 1


def out_sizes(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> tuple[int, ...]:
    """(H', W') of x [B, C, H, W] convolved with weight [O, C, kh, kw]."""
    return tuple(out_size(*sizes) for sizes in zip(x.shape[2:], weight.shape[2:], stride, padding))


def pixels(x: torch.Tensor, weight: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> int:
    """H' * W'; 0 where the kernel is larger than the padded picture."""
    sizes = out_sizes(x, weight, stride, padding)
    return math.prod(sizes) if sizes[0] > 0 else 0  # of two that are negative the product is not


def convolved(rows: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """[B, H' * W', O] as a picture [B, O, H', W'], channels-last."""
    return rows.unflatten(1, sizes).permute(0, 3, 1, 2)


def may_serve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """On the CPU, in one dtype, of sizes that fit (of others stock has an error to raise), a contiguous weight, nothing that is differentiated, no autocast."""
    return (x.is_cpu and weight.dtype is x.dtype and x.shape[1] == weight.shape[1] and weight.is_contiguous()
            and (bias is None or bias.dtype is x.dtype and bias.shape == weight.shape[:1]) and not native.recorded(x, weight, bias) and not transformed()
            and not torch.is_autocast_enabled("cpu"))
