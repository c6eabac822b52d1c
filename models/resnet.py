"""The residual block of U-Nets and autoencoders over diffusers' attribute names (``norm1``, ``conv1``, ``time_emb_proj``, ...)."""

from __future__ import annotations

import torch
from torch import nn

from fusewire import ops
from fusewire.models.layers import How, untouched


def plain_group_norm(module: nn.Module) -> bool:
    """Exactly ``nn.GroupNorm``, not observed."""
    return type(module) is nn.GroupNorm and untouched(module)


def norm_activation(norm: nn.Module, activation: nn.Module, x: torch.Tensor, how: How, add=None, shift=None, scale=None) -> torch.Tensor:
    """``activation(norm(x + add) * (1 + scale) + shift)`` for x [B, C, H, W] and the others [B, C] or None: one pass for a plain GroupNorm.

    A SiLU goes into the pass; a norm or an activation that is not plain, or that autocast casts for, is called.
    """
    if plain_group_norm(norm) and (norm.weight is None or norm.weight.dtype is x.dtype) and not torch.is_autocast_enabled(x.device.type):
        silu = type(activation) is nn.SiLU and untouched(activation)
        y = ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, shift=shift, scale=scale, add=add, silu=silu,
                                numerics=how.numerics)
        return y if silu else activation(y)
    if add is not None:
        x = x + add[:, :, None, None]
    x = norm(x)
    if scale is not None:
        x = x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return activation(x)


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
