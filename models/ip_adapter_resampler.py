"""Projections of IP-Adapters by a resampler: those of "Plus" and of FaceID Plus. Latents look at the many tokens of a picture (Alayrac et al., 2022,
"Flamingo"); state-dict keys are diffusers'."""

from __future__ import annotations

import torch
from torch import nn

from fusewire.models.cross_attention import CrossAttention
from fusewire.models.feed_forward import FeedForward, feed_forward_residual
from fusewire.models.ip_adapter_sd3 import HEAD_DIM
from fusewire.models.layers import How, linear
from fusewire.models.transformer_block import sum_norm


class ResamplerBlock(nn.Module):
    """Latents [B, K, C] look at the encoder's tokens [B, L, C] and at themselves; then a feed-forward."""

    def __init__(self, channels: int, heads: int, head_dim: int, hidden: int, how: How):
        super().__init__()
        self.how = how
        self.ln0, self.ln1 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = CrossAttention(channels, heads, head_dim, how=how, out_bias=False)
        self.ff = nn.Sequential(nn.LayerNorm(channels), FeedForward(channels, hidden, how, approximate="none", bias=False))

    def forward(self, x: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        y, (norm, feed_forward) = self.ln1(latents), self.ff
        latents, y = sum_norm(norm, latents, self.attn(y, torch.cat([self.ln0(x), y], dim=1)), self.how)
        return feed_forward_residual(feed_forward, y, None, latents, self.how)


class PlusImageProjection(nn.Module):
    """diffusers' ``IPAdapterPlusImageProjection``, a resampler (Alayrac et al., 2022, "Flamingo"): [B, L, image_channels] -> [B, tokens, channels]."""

    takes_tokens = True

    def __init__(self, image_channels: int, channels: int, width: int = 1280, depth: int = 4, heads: int = 16, head_dim: int = HEAD_DIM, tokens: int = 8,
                 mlp_ratio: float = 4.0, how: How = How()):
        super().__init__()
        self.image_channels, self.channels, self.how = image_channels, channels, how
        self.latents = nn.Parameter(torch.randn(1, tokens, width) / width**0.5)
        self.proj_in = nn.Linear(image_channels, width)
        self.proj_out = nn.Linear(width, channels)
        self.norm_out = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(ResamplerBlock(width, heads, head_dim, int(mlp_ratio * width), how) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latents, x = self.latents.expand(x.shape[0], -1, -1), linear(self.proj_in, x, self.how)
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm_out(linear(self.proj_out, latents, self.how))


class FacePlusImageProjection(nn.Module):
    """diffusers' ``IPAdapterFaceIDPlusImageProjection``: a face's embedding [B, face_channels] -> latents, which look at the picture's tokens
    ``clip_embeds``, [B, N, L, image_channels], an attribute as it is diffusers' -> [B, tokens, channels].

    ``shortcut`` (the second version's): the latents are added, ``shortcut_scale`` times what the resampler makes of them.
    """

    takes_tokens = False

    def __init__(self, face_channels: int, face_hidden: int, image_channels: int, channels: int, width: int = 768, depth: int = 4, heads: int = 16,
                 head_dim: int = HEAD_DIM, tokens: int = 4, mlp_ratio: float = 4.0, how: How = How()):
        super().__init__()
        self.image_channels, self.channels, self.tokens, self.how = face_channels, channels, tokens, how
        self.clip_embeds: torch.Tensor | None = None
        self.shortcut, self.shortcut_scale = False, 1.0
        self.proj = FeedForward(face_channels, face_hidden, how, approximate="none", out_channels=tokens * width)
        self.norm = nn.LayerNorm(width)
        self.proj_in = nn.Linear(image_channels, width)
        self.proj_out = nn.Linear(width, channels)
        self.norm_out = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(ResamplerBlock(width, heads, head_dim, int(mlp_ratio * width), how) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = self.clip_embeds
        if seen is None or seen.dim() != 4 or seen.shape[0] * seen.shape[1] != x.shape[0] or seen.shape[-1] != self.proj_in.in_features:
            given = "None" if seen is None else f"of shape {list(seen.shape)}"
            raise ValueError(f"clip_embeds is {given}; it should be [B, N, L, {self.proj_in.in_features}], with {x.shape[0]} pictures, as there are faces: "
                             "set it on the projection before the model is called")
        face = self.norm(self.proj(x.to(seen.dtype)).unflatten(-1, (self.tokens, -1)))
        latents, seen = face, linear(self.proj_in, seen, self.how).flatten(0, 1)
        for layer in self.layers:
            latents = layer(seen, latents)
        out = self.norm_out(linear(self.proj_out, latents, self.how))
        return face + self.shortcut_scale * out if self.shortcut else out
