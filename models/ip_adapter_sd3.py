"""The IP-Adapter of SD3 and SD3.5: pictures as a prompt beside the text of an MMDiT.

InstantX (2024), "SD3.5-Large-IP-Adapter", in the form that diffusers gave it; after Ye et al. (2023), "IP-Adapter". A resampler that sees the timestep makes
tokens of an encoder's states (``image_proj``). Every attention, SD3.5's second ones too, then looks once more with the queries of the image: to the image's
keys and to those of the tokens, through norms of the adapter's own (``processor``). Names and state-dict keys are those of diffusers' model after
``load_ip_adapter``. ``ip_adapter.py`` attaches it, ``ip_adapter_official.py`` loads the official checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fusewire import ops
from fusewire.kernels.rounding import compute_dtype
from fusewire.models.attention import sdpa
from fusewire.models.feed_forward import FeedForward, feed_forward_residual
from fusewire.models.layers import How, MLPEmbedder, RMSNorm, gated_linear, linear, modulations, norm_input, timestep_waves, untouched

HEAD_DIM = 64  # of a resampler's attention, in every published checkpoint; the state dict does not tell


class TimedPictures(NamedTuple):
    """What attentions see of the pictures: their tokens [B, K, C], and the timestep's embedding [B, W] by which each layer modulates them."""

    states: torch.Tensor
    temb: torch.Tensor


def _modulated(norm: nn.LayerNorm, x, shift, scale, how: How) -> torch.Tensor:
    """``norm(x) * (1 + scale) + shift`` of a norm with weight and bias."""
    if untouched(norm):
        return ops.adaln_modulate(norm_input(x), shift, scale, eps=norm.eps, weight=norm.weight, bias=norm.bias, numerics=how.numerics)
    return norm(x) * (1 + scale[:, None]) + shift[:, None]


class PackedAttention(nn.Module):
    """The resampler's attention: keys and values are one projection. The output projection is for the caller to join with what follows."""

    def __init__(self, channels: int, heads: int, how: How):
        super().__init__()
        self.heads, self.how, inner = heads, how, heads * HEAD_DIM
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_kv = nn.Linear(channels, 2 * inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels, bias=False), nn.Dropout(0.0)])

    def forward(self, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """x [B, K, C] looks at states [B, L, C] -> [B, K, heads * 64]."""
        k, v = linear(self.to_kv, states, self.how).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, HEAD_DIM)) for part in (linear(self.to_q, x, self.how), k, v))
        if self.how.attention:
            return ops.attention(q, k, v).flatten(2)
        # Stock's order: q and k take a root of the scale each, the weights are rounded before they meet v
        root = 1 / math.sqrt(math.sqrt(HEAD_DIM))
        logits = (q.transpose(1, 2) * root) @ (k.transpose(1, 2) * root).mT
        weights = logits.to(compute_dtype(logits.dtype)).softmax(dim=-1).to(logits.dtype)
        return (weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class TimeResamplerBlock(nn.Module):
    """Latents look at the encoder's states and at themselves, then a feed-forward; the timestep modulates the norms before both."""

    def __init__(self, channels: int, heads: int, hidden: int, how: How):
        super().__init__()
        self.how = how
        self.ln0, self.ln1 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = PackedAttention(channels, heads, how)
        self.ff = FeedForward(channels, hidden, how, approximate="none", bias=False)
        self.adaln_proj = nn.Linear(channels, 4 * channels)
        self.adaln_norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor, latents: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """(states [B, L, C], latents [B, K, C], the timestep's embedding [B, C]) -> latents."""
        shift_msa, scale_msa, shift_mlp, scale_mlp = linear(self.adaln_proj, F.silu(temb), self.how).chunk(4, dim=1)
        y = _modulated(self.ln1, latents, shift_msa, scale_msa, self.how)
        y = self.attn(y, torch.cat([self.ln0(x), y], dim=1))
        latents = gated_linear(self.attn.to_out[0], y, None, latents, self.how)
        y = _modulated(self.adaln_norm, latents, shift_mlp, scale_mlp, self.how)
        return feed_forward_residual(self.ff, y, None, latents, self.how)


class TimeImageProjection(nn.Module):
    """diffusers' ``IPAdapterTimeImageProjection``, a resampler (Alayrac et al., 2022, "Flamingo") that sees the timestep."""

    def __init__(self, image_channels: int, channels: int, width: int = 1280, depth: int = 4, heads: int = 20, tokens: int = 64, mlp_ratio: float = 4.0,
                 waves: int = 320, how: How = How()):
        super().__init__()
        self.image_channels, self.channels, self.width, self.waves, self.how = image_channels, channels, width, waves, how
        self.latents = nn.Parameter(torch.randn(1, tokens, width) / width**0.5)
        self.proj_in = nn.Linear(image_channels, width)
        self.proj_out = nn.Linear(width, channels)
        self.norm_out = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(TimeResamplerBlock(width, heads, int(mlp_ratio * width), how) for _ in range(depth))
        self.time_embedding = MLPEmbedder(waves, width)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> TimedPictures:
        """(an encoder's states [B, L, image_channels], timestep [B], 0 to 1000) -> tokens [B, K, channels] and the timestep's embedding [B, width]."""
        temb = self.time_embedding(timestep_waves(timestep, self.waves, x.dtype))
        latents, x = self.latents.expand(x.shape[0], -1, -1), linear(self.proj_in, x, self.how) + temb[:, None]
        for layer in self.layers:
            latents = layer(x, latents, temb)
        return TimedPictures(self.norm_out(linear(self.proj_out, latents, self.how)), temb)


class AdaLayerNorm(nn.Module):
    """A LayerNorm that the timestep's embedding modulates. Chunks are shift, scale."""

    def __init__(self, time_channels: int, channels: int, how: How):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(time_channels, 2 * channels)

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """[B, K, C], [B, W] -> [B, K, C]."""
        shift, scale = modulations(self, x, F.silu(temb), 2, self.how)
        return ops.adaln_modulate(norm_input(x), shift, scale, eps=1e-6, numerics=self.how.numerics)


class JointDecoupledAttention(nn.Module):
    """What one attention of an MMDiT adds for the pictures, ``scale`` times: a list of one number, as there is one adapter."""

    def __init__(self, in_channels: int, time_channels: int, channels: int, heads: int, how: How = How()):
        super().__init__()
        self.how, self.scale = how, [0.5]
        self.norm_ip = AdaLayerNorm(time_channels, in_channels, how)
        self.to_k_ip, self.to_v_ip = (nn.Linear(in_channels, channels, bias=False) for _ in range(2))
        self.norm_q, self.norm_k, self.norm_ip_k = (RMSNorm(channels // heads, eps=1e-6) for _ in range(3))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pictures: TimedPictures) -> torch.Tensor | None:
        """q, k, v [B, T, H, D] of the image, before any norm -> its attention to [image, pictures], [B, T, H * D]; None where the scale is 0."""
        if not self.scale[0]:
            return None
        x = self.norm_ip(*pictures)
        k2, v2 = (linear(layer, x, self.how).unflatten(-1, q.shape[2:]) for layer in (self.to_k_ip, self.to_v_ip))
        norm_q, norm_k, norm_k2 = norms = self.norm_q, self.norm_k, self.norm_ip_k
        within = {}
        if not all(map(untouched, norms)):
            q, k, k2 = norm_q(q), norm_k(k), norm_k2(k2)
        elif self.how.attention:
            within = dict(q_weight=norm_q.weight, k_weight=norm_k.weight, k2_weight=norm_k2.weight, eps=norm_q.eps)
        else:
            q, k = ops.qk_norm_rope(q, k, norm_q.weight, norm_k.weight, eps=norm_q.eps, numerics=self.how.numerics)
            k2 = ops.rms_norm(k2, norm_k2.weight, eps=norm_k2.eps, numerics=self.how.numerics)
        if self.how.attention:  # the pictures are a second stream that asks nothing
            return ops.joint_attention(q, k, v, q[:, :0], k2, v2, **within)[0].flatten(2)
        k, v = (torch.cat([one.transpose(1, 2), two.transpose(1, 2)], dim=2) for one, two in ((k, k2), (v, v2)))
        return sdpa(q.transpose(1, 2), k, v)

    def added(self, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """out + scale * y; in ``close`` one pass."""
        return torch.add(out, y, alpha=self.scale[0]) if self.how.numerics == "close" else out + y * self.scale[0]

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def pictures_of(projection: TimeImageProjection | None, name: str, embeds: torch.Tensor | None, timestep: torch.Tensor) -> TimedPictures | None:
    """The projected pictures, or None where the model has no adapter. ``name``: of the argument ``embeds``, which errors tell.

    Raises: ValueError naming what is missing, too much or of another shape.
    """
    if projection is None:
        if embeds is not None:
            raise ValueError(f"{name} is given; it should be None, as the model has no IP-Adapter")
        return None
    wanted = f"[{timestep.shape[0]}, L, {projection.image_channels}]"
    if embeds is None:
        raise ValueError(f"{name} is None; it should be {wanted}, as the model has an IP-Adapter")
    if embeds.dim() != 3 or embeds.shape[0] != timestep.shape[0] or embeds.shape[2] != projection.image_channels or 0 in embeds.shape:
        raise ValueError(f"{name} has shape {list(embeds.shape)}; it should be {wanted}")
    return projection(embeds, timestep)


def time_projection(weights: Mapping[str, torch.Tensor], how: How = How()) -> TimeImageProjection:
    """Of the shapes that these weights have, under diffusers' names; they are not loaded. KeyError where they are another projection's."""
    if not weights.keys() >= {"latents", "proj_in.weight", "proj_out.weight", "layers.0.attn.to_q.weight", "layers.0.ff.net.0.proj.weight",
                              "time_embedding.linear_1.weight"}:
        raise KeyError(f"state_dict has a projection of {sorted(weights)}, which no IP-Adapter of an MMDiT has")
    _, tokens, width = weights["latents"].shape
    depth = len({key.split(".")[1] for key in weights if key.startswith("layers.")})
    heads, hidden = weights["layers.0.attn.to_q.weight"].shape[0] // HEAD_DIM, weights["layers.0.ff.net.0.proj.weight"].shape[0]
    return TimeImageProjection(weights["proj_in.weight"].shape[1], weights["proj_out.weight"].shape[0], width, depth, heads, tokens, hidden / width,
                               weights["time_embedding.linear_1.weight"].shape[1], how)
