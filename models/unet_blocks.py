"""The blocks of U-Nets and autoencoders, under diffusers' attribute names: residual blocks, each with or without an attention, then a resampling.

One class serves each way: diffusers' ``DownBlock2D``, ``CrossAttnDownBlock2D``, ``AttnDownBlock2D``, ``ResnetDownsampleBlock2D`` and
``DownEncoderBlock2D`` differ in what stands behind a residual block and in how the last layer halves the picture; upwards likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from fusewire.models.cross_attention import CrossAttention
from fusewire.models.feed_forward import FeedForward
from fusewire.models.ip_adapter import Pictures
from fusewire.models.layers import How, linear
from fusewire.models.resnet import Downsample, Residual, ResnetBlock, Upsample, norm_activation
from fusewire.models.transformer_block import affine_block


class Text(NamedTuple):
    """What pictures attend to: states [B, L, C'] and a mask added to the logits, [B, 1, 1, L] or None; what IP-Adapters add to it."""

    states: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    pictures: Pictures | None = None


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward with GEGLU, each behind a LayerNorm."""

    def __init__(self, channels: int, heads: int, text_channels: int, only_cross_attention: bool, how: How):
        super().__init__()
        self.how, self.only_cross_attention = how, only_cross_attention
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = CrossAttention(channels, heads, channels // heads, text_channels if only_cross_attention else None, how=how)
        self.attn2 = CrossAttention(channels, heads, channels // heads, text_channels, how=how)
        self.ff = FeedForward(channels, 4 * channels, how, gated=True)

    def forward(self, hidden_states: torch.Tensor, text: Text) -> torch.Tensor:
        """[B, T, C] -> [B, T, C]."""
        more = None if text.pictures is None else dict(pictures=text.pictures)
        return affine_block(self, hidden_states, self.how, text.states, context_mask=text.mask, attention_kwargs=more)


class Transformer2D(nn.Module):
    """Transformer blocks over the positions of a picture, between projections (1x1 convolutions or linears) behind a GroupNorm; a residual."""

    def __init__(self, channels: int, heads: int, depth: int, text_channels: int, groups: int, use_linear: bool, only_cross_attention: bool,
                 how: How):
        super().__init__()
        self.how, self.use_linear_projection = how, use_linear

        def projection():
            return nn.Linear(channels, channels) if use_linear else nn.Conv2d(channels, channels, 1)

        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, text_channels, only_cross_attention, how) for _ in range(depth))
        self.proj_out = projection()

    def forward(self, hidden_states: torch.Tensor, text: Text) -> torch.Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        batch, channels, height, width = hidden_states.shape
        x = norm_activation(self.norm, None, hidden_states, self.how)
        if not self.use_linear_projection:
            x = self.proj_in(x)
        x = x.permute(0, 2, 3, 1).reshape(batch, height * width, channels)  # b c h w -> b (h w) c
        if self.use_linear_projection:
            x = linear(self.proj_in, x, self.how)
        for block in self.transformer_blocks:
            x = block(x, text)
        if self.use_linear_projection:
            x = linear(self.proj_out, x, self.how)
        x = x.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()  # b (h w) c -> b c h w
        if not self.use_linear_projection:
            x = self.proj_out(x)
        return x + hidden_states


# Makes the attention behind the residual block of this index.
Attentions = Callable[[int], nn.Module] | None


def _attentions(make: Attentions, count: int) -> nn.ModuleList | None:
    return None if make is None else nn.ModuleList(map(make, range(count)))


def _attended(attention: nn.Module, x: torch.Tensor, text: Text) -> torch.Tensor:
    return attention(x, text) if isinstance(attention, Transformer2D) else attention(x)


class DownBlock(nn.Module):
    """Residual blocks (with attentions), then half the size. ``downsample``: ``"conv"``, ``"resnet"`` or None; ``padding`` of the convolution."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, common: Residual, attention: Attentions = None,
                 downsample: str | None = "conv", padding: int = 1):
        super().__init__()
        self.attentions = _attentions(attention, layers)
        self.resnets = nn.ModuleList(ResnetBlock(out_channels if index else in_channels, out_channels, common) for index in range(layers))
        self.downsamplers = None
        if downsample is not None:
            self.downsamplers = nn.ModuleList([ResnetBlock(out_channels, out_channels, common, down=True) if downsample == "resnet"
                                               else Downsample(out_channels, padding=padding)])

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None, text: Text = Text(), adapted: torch.Tensor | None = None):
        """-> (x, what the way up will see of this block). ``adapted``: a residual of a T2I-Adapter. It joins behind the last attention to text, and
        where there is none, at the end of the block."""
        skips, inside = [], self.attentions is not None and isinstance(self.attentions[-1], Transformer2D)
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions is not None:
                x = _attended(self.attentions[index], x, text)
            if inside and adapted is not None and index == len(self.resnets) - 1:
                x = x + adapted
            skips.append(x)
        for sampler in self.downsamplers or ():
            x = sampler(x, temb) if isinstance(sampler, ResnetBlock) else sampler(x)
            skips.append(x)
        if not inside and adapted is not None:
            skips[-1] = x = x + adapted
        return x, skips


class MidBlock(nn.Module):
    """A residual block, then ``layers`` times an attention and a residual block."""

    def __init__(self, channels: int, layers: int, common: Residual, attention: Attentions = None):
        super().__init__()
        self.attentions = _attentions(attention, layers)
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, common) for _ in range(layers + 1))

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None, text: Text = Text()) -> torch.Tensor:
        for index, resnet in enumerate(self.resnets):
            if index and self.attentions is not None:
                x = _attended(self.attentions[index - 1], x, text)
            x = resnet(x, temb)
        return x


class UpBlock(nn.Module):
    """Residual blocks (with attentions) of the input and of what the way down left, then twice the size.

    ``in_channels`` of each residual block, what the way down left included. ``upsample`` as in ``DownBlock``.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, common: Residual, attention: Attentions = None, upsample: str | None = "conv"):
        super().__init__()
        self.attentions = _attentions(attention, len(in_channels))
        self.resnets = nn.ModuleList(ResnetBlock(channels, out_channels, common) for channels in in_channels)
        self.upsamplers = None
        if upsample is not None:
            self.upsamplers = nn.ModuleList([ResnetBlock(out_channels, out_channels, common, up=True) if upsample == "resnet"
                                             else Upsample(out_channels)])

    def forward(self, x: torch.Tensor, skips: list[torch.Tensor] | None = None, temb: torch.Tensor | None = None, text: Text = Text(),
                size: torch.Size | None = None) -> torch.Tensor:
        """``skips``: of the way down, the last one first to be used and taken from the list; None in an autoencoder. ``size``: of the result, where
        twice the size would not meet the next skip."""
        for index, resnet in enumerate(self.resnets):
            x = resnet(x if skips is None else torch.cat([x, skips.pop()], dim=1), temb)
            if self.attentions is not None:
                x = _attended(self.attentions[index], x, text)
        for sampler in self.upsamplers or ():
            x = sampler(x, temb) if isinstance(sampler, ResnetBlock) else sampler(x, size)
        return x
