"""A convolution as one product, whose patches are gathered where they are multiplied: nothing is unfolded in memory.

On AMX (csrc/cpu/amx_convolution.cpp): by strides of 1, where it is up to twice as fast as oneDNN's in bfloat16 and float32, in float16 up to 6.9 times
(benchmarks/results/amx-shared/convolutions.json), and in float32 errs less.

On Intel without AMX (native.WIDENED): in 16 bits, where oneDNN convolves SD1.5's and its autoencoder's shapes at half the rate of these products, in
float32 at more (benchmarks/results/xeon-avx512/convolutions.json). Where the weight outweighs the picture, each of its numbers, which lie a tap apart, is
packed for few pixels: patches.py is faster there.

In float16 on a processor without instructions for it (native.SLOW_FLOAT16), AMD's among them: every convolution, as PyTorch's take 5 to 270 times as long
(benchmarks/results/zen4/convolutions-float16.json).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fusewire.kernels.library import CPU, define
from fusewire.kernels.linear import native
from fusewire.kernels.linear.pictures import convolved, may_serve, out_sizes, pixels

WIDENED_DTYPES = torch.bfloat16, torch.float16
AMX_DTYPES = *WIDENED_DTYPES, torch.float32
CHANNELS, OUTPUTS, PIXELS = 64, 32, 64  # the least: of a tap, of the result, of a sample's result


def _meaning(x, weight, bias, stride_h: int, stride_w: int, pad_h: int, pad_w: int) -> torch.Tensor:
    return F.conv2d(x, weight, bias, (stride_h, stride_w), (pad_h, pad_w)).flatten(2).transpose(1, 2).contiguous()


def _fake(x, weight, bias, stride_h: int, stride_w: int, pad_h: int, pad_w: int) -> torch.Tensor:
    pixels = math.prod(out_sizes(x, weight, (stride_h, stride_w), (pad_h, pad_w)))
    return x.new_empty((x.shape[0], pixels, weight.shape[0]))


_rows_op = define("conv_rows(Tensor x, Tensor weight, Tensor? bias, int stride_h, int stride_w, int pad_h, int pad_w) -> Tensor", fallback=_meaning, fake=_fake)
_why_not_library = CPU.why_not("conv_rows")


def serves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> bool:
    """Whether ``convolution`` is worth it: for x [B, C, H, W], a contiguous weight [O, C, kh, kw] and a bias [O] or None that are not trained."""
    tiles, slow = native.ISA == "amx", native.SLOW_FLOAT16 and x.dtype is torch.float16
    dtypes = AMX_DTYPES if tiles else WIDENED_DTYPES if native.WIDENED else ()
    if not (slow or x.dtype in dtypes) or _why_not_library or not may_serve(x, weight, bias):
        return False
    if slow:
        return pixels(x, weight, stride, padding) > 0
    # One tap of a picture that lies channels-last is a product whose rows oneDNN reads as they are.
    if tiles and (stride != (1, 1) or x.dtype is torch.bfloat16 and weight.shape[2:].numel() == 1):
        return False
    # By the sample, not by the batch: whether a sample is in a batch must not change its result.
    outputs = 1 if x.dtype is torch.float32 else OUTPUTS  # oneDNN's float32 would want the picture contiguous first
    return x.shape[1] >= CHANNELS and weight.shape[0] >= outputs and pixels(x, weight, stride, padding) >= PIXELS


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> torch.Tensor:
    """``F.conv2d(x, weight, bias, stride, padding)`` in ``close`` -> [B, O, H', W'], channels-last. Not differentiable."""
    y = _rows_op(x.contiguous(memory_format=torch.channels_last), weight, bias, *stride, *padding)
    return convolved(y, out_sizes(x, weight, stride, padding))
