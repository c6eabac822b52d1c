"""A convolution in the form in which it is faster on the CPU, whatever the format of its input."""

from __future__ import annotations

import torch
from torch import nn
from torch._prims_common import suggest_memory_format

from fusewire.kernels.dispatch import transformed
from fusewire.kernels.library import cpu_is_intel
from fusewire.kernels.linear import patches, rows

# PyTorch's CPU convolutions lay out anew what is not as oneDNN wants it: contiguous pictures at each call, contiguous weights only for channels-last
# pictures. On Intel (AMX, AVX512-BF16 and AVX-512) pictures therefore go channels-last where they outweigh the weights by this factor: up to 4 times as
# fast in autoencoders, and no slower at the limit. On AMD's Zen 5 they do in bfloat16 wherever the convolution is not one of patches: 1.0 to 1.2 times
# as fast; in float16, where there are no instructions for it, a contiguous picture takes 31 to 39 times as long as a channels-last one
# (benchmarks/results/zen4/convolutions-float16.json). (On Intel without AMX rows.py serves nearly all in 16 bits.) In float32 oneDNN's channels-last
# convolutions err up to nine times as much as its contiguous ones, which breaks the rule of close.
WEIGHTS_PER_PICTURE = 2
INTEL = cpu_is_intel()


def convolution(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """``module(x)`` for x [B, C, H, W]; the result may be channels-last, but lies as stock's in training, where dropouts draw in the order of memory.
    Weights that are channels-last themselves are the user's choice, and stay so. PyTorch's own is what was replaced on the instance (for seamless tiling),
    has a computed weight, or is differentiated by a transform."""
    y = _convolution(module, x)
    if not module.training or not x.is_cpu or x.dim() != 4 or transformed():
        return y
    last = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(module.weight))  # by either of the two, as PyTorch chooses
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _convolution(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    weight = module._parameters.get("weight")  # None where a parametrisation computes it, once in each forward
    if weight is not None and x.is_cpu and x.dim() == 4 and weight.is_contiguous() and "_conv_forward" not in vars(module):
        call = x, weight, module.bias, module.stride, module.padding
        if module.padding_mode == "zeros" and module.dilation == (1, 1) and module.groups == 1 and not isinstance(module.padding, str):
            for way in (patches, rows):
                if way.serves(*call):
                    return way.convolution(*call)
        if x.dtype in (torch.bfloat16, torch.float16) and not transformed():
            pictures = x.shape[0] * x.shape[2] * x.shape[3] * (x.shape[1] + weight.shape[0])
            wide = not INTEL or weight.numel() <= WEIGHTS_PER_PICTURE * pictures
            x = x.contiguous(memory_format=torch.channels_last if wide else torch.contiguous_format)
        elif x.dtype is torch.float32 and not (module.training and weight.requires_grad and torch.is_grad_enabled()):
            # Channels-last where one of ours came before; in training it is stock's that lies so, and the weight's gradient errs less by it
            x = x.contiguous()
    return nn.Conv2d.forward(module, x)
