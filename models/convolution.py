"""A convolution in the memory format in which it is faster on the CPU, whatever the format of its input."""

from __future__ import annotations

import torch
from torch import nn

from fusewire.kernels.library import cpu_is_intel

# PyTorch's CPU convolutions lay out anew what is not as oneDNN wants it: contiguous pictures at each call, contiguous weights only for channels-last
# pictures. So pictures go channels-last where they outweigh the weights by this factor (measured on Intel with AMX, AVX512-BF16 and AVX-512: up to 4
# times as fast in autoencoders, and no slower at the limit). On AMD's Zen 5 contiguous ones are 1.05 to 1.3 times as fast. In float32 oneDNN's
# channels-last convolutions err up to nine times as much as its contiguous ones, which breaks the rule of close.
WEIGHTS_PER_PICTURE = 2
INTEL = cpu_is_intel()


def convolution(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """``module(x)`` for x [B, C, H, W]; the result may be channels-last. Weights that are channels-last themselves are the user's choice, and stay so."""
    weight = module.weight
    if INTEL and x.is_cpu and x.dtype is not torch.float32 and x.dim() == 4 and weight.is_contiguous():
        pictures = x.shape[0] * x.shape[2] * x.shape[3] * (x.shape[1] + weight.shape[0])
        wide = weight.numel() <= WEIGHTS_PER_PICTURE * pictures
        x = x.contiguous(memory_format=torch.channels_last if wide else torch.contiguous_format)
    return nn.Conv2d.forward(module, x)
