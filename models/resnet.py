"""The residual block of U-Nets and autoencoders over diffusers' attribute names (``norm1``, ``conv1``, ``time_emb_proj``, ...)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fusewire import ops
from fusewire.kernels.checks import autocasts, kind_of
from fusewire.models.layers import How, untouched


def plain_group_norm(module: nn.Module) -> bool:
    """Exactly ``nn.GroupNorm``, not observed."""
    return type(module) is nn.GroupNorm and untouched(module)


def norm_activation(norm: nn.Module, activation: nn.Module | None, x: torch.Tensor, how: How, add=None, shift=None, scale=None) -> torch.Tensor:
    """``activation(norm(x + add) * (1 + scale) + shift)`` for x [B, C, H, W] and the others [B, C] or None: one pass for a plain GroupNorm.

    Without an activation where it is None. A SiLU goes into the pass; a norm or an activation that is not plain, or that autocast casts for, is
    called. So are all in ``exact`` on a GPU, where no kernel repeats the norm's order of summation.
    """
    if ((x.is_cpu or how.numerics == "close") and plain_group_norm(norm) and (norm.weight is None or norm.weight.dtype is x.dtype)
            and not autocasts(kind_of(x))):
        silu = type(activation) is nn.SiLU and untouched(activation)
        y = ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, shift=shift, scale=scale, add=add, silu=silu,
                                numerics=how.numerics)
        return y if silu or activation is None else activation(y)
    if add is not None:
        x = x + add[:, :, None, None]
    x = norm(x)
    if scale is not None:
        x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return x if activation is None else activation(x)


def resnet_block(block, x: torch.Tensor, temb: torch.Tensor | None, how: How) -> torch.Tensor:
    """The forward of a residual block: [B, C, H, W] and the time embedding [B, E] or None -> [B, C', H', W'].

    Submodules are called; what lies between them is fused: GroupNorm with SiLU, before it the sum with the time embedding, or behind the norm its
    scale and shift (``time_embedding_norm="scale_shift"``, AdaGN).
    """
    y = norm_activation(block.norm1, block.nonlinearity, x, how)
    if block.upsample is not None:
        if y.shape[0] >= 64:  # PyTorch's nearest neighbours fail for large channels-last batches
            x, y = x.contiguous(), y.contiguous()
        x, y = block.upsample(x), block.upsample(y)
    elif block.downsample is not None:
        x, y = block.downsample(x), block.downsample(y)
    y = block.conv1(y)

    if block.time_emb_proj is not None:
        temb = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
    add = shift = scale = None
    if block.time_embedding_norm == "scale_shift":
        scale, shift = temb.chunk(2, dim=1)
    elif block.time_embedding_norm == "default":
        add = temb
    y = norm_activation(block.norm2, block.nonlinearity, y, how, add, shift, scale)
    y = block.conv2(block.dropout(y))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x.contiguous() if block.training else x)
    y = x + y
    return y if block.output_scale_factor == 1 else y / block.output_scale_factor


class Residual(NamedTuple):
    """What the residual blocks of a model have in common. ``time_embedding_norm``: ``"default"`` adds the time embedding in front of the second norm,
    ``"scale_shift"`` scales and shifts behind it; ``temb_channels`` None: there is none."""

    groups: int
    eps: float
    temb_channels: int | None = None
    time_embedding_norm: str = "default"
    how: How = How()


class ResnetBlock(nn.Module):
    """[B, C, H, W] and the time embedding [B, E] or None -> [B, C', H, W]; at twice (``up``) or half (``down``) the size."""

    output_scale_factor, skip_time_act = 1.0, False

    def __init__(self, in_channels: int, out_channels: int, common: Residual, up: bool = False, down: bool = False):
        super().__init__()
        self.how, self.time_embedding_norm = common.how, common.time_embedding_norm
        self.norm1 = nn.GroupNorm(common.groups, in_channels, eps=common.eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        parts = 2 if common.time_embedding_norm == "scale_shift" else 1
        self.time_emb_proj = None if common.temb_channels is None else nn.Linear(common.temb_channels, parts * out_channels)
        self.norm2 = nn.GroupNorm(common.groups, out_channels, eps=common.eps)
        self.dropout = nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = nn.SiLU()
        self.upsample = Upsample(in_channels, conv=False) if up else None
        self.downsample = Downsample(in_channels, conv=False) if down else None
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        return resnet_block(self, x, temb, self.how)


class Downsample(nn.Module):
    """[B, C, H, W] -> half the size: a strided convolution, or the mean of four pixels.

    Without ``padding`` a row and a column of zeros are added at the bottom and at the right, as in autoencoders.
    """

    def __init__(self, channels: int, conv: bool = True, padding: int = 1):
        super().__init__()
        self.pads = conv and padding == 0
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding) if conv else nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pads else x)


class Upsample(nn.Module):
    """[B, C, H, W] -> twice the size, or ``size``: nearest neighbours, then a convolution."""

    def __init__(self, channels: int, conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: torch.Tensor, size: torch.Size | None = None) -> torch.Tensor:
        if x.shape[0] >= 64 or 4 * x.numel() > 2**31:  # PyTorch's nearest neighbours fail for large channels-last pictures
            x = x.contiguous()
        x = F.interpolate(x, size=size, scale_factor=2.0 if size is None else None, mode="nearest")
        return x if self.conv is None else self.conv(x)
