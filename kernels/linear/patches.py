"""A convolution of small pictures as a linear layer over their patches.

Its weight [O, C, kh, kw] is read once and as it lies. oneDNN's convolution lays it out anew at each call, which takes longer than the products where the
weight outweighs the picture: in the deepest levels of a U-Net.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fusewire.kernels.library import CPU, cpu_is_intel, define
from fusewire.kernels.linear import native
from fusewire.kernels.linear.op import linear
from fusewire.kernels.linear.pictures import convolved, may_serve, out_size, out_sizes, pixels

INTEL = cpu_is_intel()
MAX_TAPS = 64
# Weights for each number of a sample's input and output, from which on the patches are faster. Measured on Zen 5 (GFLOP/s, convolution and here):
# bfloat16 450 and 640 at 8 x 8, 700 and 760 at 16 x 16 pixels of 1280 channels, less at 32 x 32 of 640; float32 210 to 280 and 290 to 330 at 8 x 8,
# and with 16 x 16 the whole U-Net of SD1.5 takes 0.96 of the time that it takes without patches. On Intel without AMX
# (benchmarks/results/xeon-avx512/convolutions.json) 16 bits gain as much at 8 x 8 and 16 x 16, float32 nothing.
# By the sample, not by the batch: whether a sample is in a batch must not change its result.
WEIGHTS_PER_NUMBER = {torch.bfloat16: 8, torch.float32: 12}
# With AMX rows.py is faster but for 8 x 8 pixels of 1280 channels (benchmarks/results/amx-shared/convolutions.json).
AMX_WEIGHTS_PER_NUMBER = dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), 48)
WIDENED_WEIGHTS_PER_NUMBER = {torch.bfloat16: 8, torch.float16: 8}
# Without instructions for float16 rows.py serves the others: for few pixels it packs weights that lie a tap apart one by one.
SLOW_FLOAT16_WEIGHTS_PER_NUMBER = 12


def _meaning(x, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int) -> torch.Tensor:
    rows = F.unfold(x, (kernel_h, kernel_w), padding=(pad_h, pad_w), stride=(stride_h, stride_w))
    return rows.transpose(1, 2).contiguous()


def _fake(x, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int) -> torch.Tensor:
    pixels = out_size(x.shape[2], kernel_h, stride_h, pad_h) * out_size(x.shape[3], kernel_w, stride_w, pad_w)
    return x.new_empty((x.shape[0], pixels, x.shape[1] * kernel_h * kernel_w))


_patches_op = define("conv_patches(Tensor x, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w) -> Tensor", fallback=_meaning, fake=_fake)
_why_not_library = CPU.why_not("conv_patches")


def _least(dtype: torch.dtype) -> int | None:
    if native.SLOW_FLOAT16 and dtype is torch.float16:
        return SLOW_FLOAT16_WEIGHTS_PER_NUMBER
    if native.WIDENED:
        return WIDENED_WEIGHTS_PER_NUMBER.get(dtype)
    if native.ISA == "amx":
        return AMX_WEIGHTS_PER_NUMBER.get(dtype)
    return None if INTEL else WEIGHTS_PER_NUMBER.get(dtype)


def serves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether ``convolution`` is worth it: for x [B, C, H, W], a contiguous weight [O, C, kh, kw] and a bias [O] or None that are not trained."""
    least = _least(x.dtype)
    if least is None or not CPU.loaded or _why_not_library or not may_serve(x, weight, bias):
        return False
    count = pixels(x, weight, stride, padding)
    numbers = x.shape[1] * x.shape[2] * x.shape[3] + weight.shape[0] * count
    slow = native.SLOW_FLOAT16 and x.dtype is torch.float16  # ours from the first pixel on
    return (numbers * least <= weight.numel() and count >= (1 if slow else native.FEW_TOKENS) and 1 < weight.shape[2] * weight.shape[3] <= MAX_TAPS
            and (slow or x.dtype is torch.float32 or native.ONEDNN_BFLOAT16))


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> torch.Tensor:
    """``F.conv2d(x, weight, bias, stride, padding)`` in ``close`` -> [B, O, H', W'], channels-last. Not differentiable."""
    y = linear(_patches_op(x, *weight.shape[2:], *stride, *padding), weight.flatten(1), bias, numerics="close")
    return convolved(y, out_sizes(x, weight, stride, padding))
