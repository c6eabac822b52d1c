"""PixArt-alpha and PixArt-sigma, on Fusewire's ops.

Chen et al. (2023), "PixArt-alpha"; Chen et al. (2024), "PixArt-sigma". DiT blocks with attention to a text, under one modulation for all blocks, to
which each adds a table of its own (adaLN-single). Attribute names and state-dict keys are those of diffusers' ``PixArtTransformer2DModel``;
``from_official`` maps the official repositories' names onto them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fusewire import ops
from fusewire.models.configuration import StockConfig
from fusewire.models.cross_attention import CrossAttention
from fusewire.models.feed_forward import FeedForward
from fusewire.models.inputs import check_inputs, present
from fusewire.models.layers import How, MLPEmbedder, linear, norm_input, timestep_waves
from fusewire.models.patches import PatchEmbed, unpatchify
from fusewire.models.transformer_block import single_block


@dataclass(frozen=True)
class PixArtConfig(StockConfig):
    """Field names and defaults of diffusers' ``PixArtTransformer2DModel`` config.

    ``use_additional_conditions`` (resolution and aspect ratio, of alpha at 1024 pixels) None: where ``sample_size`` is 128.
    """

    stock = "PixArtTransformer2DModel"
    # No GroupNorm here has groups, no timestep is looked up, and PyTorch's attention, which diffusers calls, knows no upcast
    fixed = dict(dropout=(0.0,), norm_num_groups=(), activation_fn=("gelu-approximate",), num_embeds_ada_norm=(), upcast_attention=(),
                 norm_type=("ada_norm_single",), norm_elementwise_affine=(False,), attention_type=("default",))

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    cross_attention_dim: int | None = 1152
    attention_bias: bool = True
    sample_size: int = 128
    patch_size: int = 2
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None

    def __post_init__(self):
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size is {self.sample_size}; it should be a multiple of patch_size = {self.patch_size}")
        for name, value in (("out_channels", self.in_channels), ("interpolation_scale", max(self.sample_size // 64, 1)),
                            ("use_additional_conditions", self.sample_size == 128)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.caption_channels is not None and self.cross_attention_dim not in (None, self.inner_dim):
            raise ValueError(f"cross_attention_dim is {self.cross_attention_dim}; it should be {self.inner_dim}, to which captions are projected")

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class CaptionProjection(nn.Module):
    """Linear, GELU in its tanh form, linear: [B, L, caption_channels] -> [B, L, C]."""

    def __init__(self, in_channels: int, channels: int, how: How):
        super().__init__()
        self.how = how
        self.linear_1, self.linear_2 = nn.Linear(in_channels, channels), nn.Linear(channels, channels)

    def forward(self, caption: torch.Tensor) -> torch.Tensor:
        return linear(self.linear_2, linear(self.linear_1, caption, self.how, activation="gelu_tanh"), self.how)


class TimeSizeEmbed(nn.Module):
    """timestep [B], and with ``sizes`` the resolution [B, 2] and the aspect ratio [B, 1], -> [B, C]."""

    WAVES = 256

    def __init__(self, channels: int, sizes: bool):
        super().__init__()
        self.timestep_embedder = MLPEmbedder(self.WAVES, channels)
        self.sizes = sizes
        if sizes:
            self.resolution_embedder = MLPEmbedder(self.WAVES, channels // 3)
            self.aspect_ratio_embedder = MLPEmbedder(self.WAVES, channels // 3)

    def forward(self, timestep: torch.Tensor, resolution: torch.Tensor | None, aspect_ratio: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        temb = self.timestep_embedder(timestep_waves(timestep, self.WAVES, dtype))
        if not self.sizes:
            return temb
        parts = [embedder(timestep_waves(value.flatten(), self.WAVES, dtype)).view(temb.shape[0], -1)
                 for embedder, value in ((self.resolution_embedder, resolution), (self.aspect_ratio_embedder, aspect_ratio))]
        return temb + torch.cat(parts, dim=1)


class AdaLayerNormSingle(nn.Module):
    """-> (the modulation that all blocks share [B, 6 C], the embedded timestep [B, C])."""

    def __init__(self, channels: int, sizes: bool, how: How):
        super().__init__()
        self.how = how
        self.emb = TimeSizeEmbed(channels, sizes)
        self.linear = nn.Linear(channels, 6 * channels)

    def forward(self, timestep: torch.Tensor, resolution: torch.Tensor | None, aspect_ratio: torch.Tensor | None, dtype: torch.dtype):
        temb = self.emb(timestep, resolution, aspect_ratio, dtype)
        return linear(self.linear, F.silu(temb), self.how), temb


class PixArtBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward, under the shared modulation plus the block's own table."""

    only_cross_attention = False

    def __init__(self, config: PixArtConfig, how: How):
        super().__init__()
        self.how, channels = how, config.inner_dim
        heads = dict(heads=config.num_attention_heads, head_dim=config.attention_head_dim, bias=config.attention_bias, how=how)
        self.norm1, self.norm2 = (nn.LayerNorm(channels, elementwise_affine=False, eps=config.norm_eps) for _ in range(2))
        self.attn1 = CrossAttention(channels, **heads)
        self.attn2 = None if config.cross_attention_dim is None else CrossAttention(channels, context_channels=config.cross_attention_dim, **heads)
        self.ff = FeedForward(channels, 4 * channels, how)
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)

    def forward(self, hidden_states: torch.Tensor, modulation: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                mask: torch.Tensor | None = None, encoder_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(tokens [B, T, C], modulation [B, 6 C], text [B, L, C'], masks added to the logits [B, 1, 1, T or L]) -> [B, T, C]."""
        return single_block(self, hidden_states, self.how, modulation, encoder_hidden_states, mask, encoder_mask)


class PixArt(nn.Module):
    """The noise, and where ``out_channels`` is twice ``in_channels`` also the variance, predicted by PixArt. ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: PixArtConfig, numerics: str = "close"):
        super().__init__()
        self.how = how = How.of(numerics)
        self.config, self.numerics = config, numerics
        channels = config.inner_dim
        self.pos_embed = PatchEmbed(config.patch_size, config.in_channels, channels, None, config.sample_size // config.patch_size,
                                    config.interpolation_scale)
        self.transformer_blocks = nn.ModuleList(PixArtBlock(config, how) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)
        self.proj_out = nn.Linear(channels, config.patch_size**2 * config.out_channels)
        self.adaln_single = AdaLayerNormSingle(channels, config.use_additional_conditions, how)
        self.caption_projection = None if config.caption_channels is None else CaptionProjection(config.caption_channels, channels, how)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None, timestep: torch.Tensor,
                added_cond_kwargs: Mapping[str, torch.Tensor | None] | None = None, attention_mask: torch.Tensor | None = None,
                encoder_attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the network predicts for ``hidden_states``.

        Args:
            hidden_states: [B, in_channels, H, W] latents; H and W multiples of the patch size.
            encoder_hidden_states: [B, L, caption_channels] text states ([B, L, cross_attention_dim] for a model that projects no captions).
            timestep: [B], 0 to 999.
            added_cond_kwargs: ``resolution`` [B, 2] and ``aspect_ratio`` [B, 1], where the model has ``use_additional_conditions``.
            attention_mask, encoder_attention_mask: [B, T] and [B, L], 1 for tokens to see and 0 for those not to; or what is added to the logits,
                [B, 1, T] and [B, 1, L].

        Returns: [B, out_channels, H, W]; with a learned variance the second half of the channels.
        Raises: ValueError naming the argument that is missing or whose shape or device does not fit, TypeError whose dtype does not.
        """
        given = dict(added_cond_kwargs or {})
        masks = present(attention_mask=attention_mask, encoder_attention_mask=encoder_attention_mask)
        self._check(hidden_states, encoder_hidden_states, timestep, given, masks)
        p, (height, width) = self.config.patch_size, hidden_states.shape[-2:]
        x = self.pos_embed(hidden_states).contiguous()
        modulation, temb = self.adaln_single(timestep, given.get("resolution"), given.get("aspect_ratio"), x.dtype)
        mask, text_mask = _additive(attention_mask, x.dtype), _additive(encoder_attention_mask, x.dtype)
        text = encoder_hidden_states if self.caption_projection is None else self.caption_projection(encoder_hidden_states)
        for block in self.transformer_blocks:
            x = block(x, modulation, text, mask, text_mask)
        shift, scale = (self.scale_shift_table[None] + temb[:, None]).unbind(1)
        x = ops.adaln_modulate(norm_input(x), shift, scale, eps=self.norm_out.eps, numerics=self.how.numerics)
        return unpatchify(linear(self.proj_out, x, self.how), height // p, width // p, p)

    def _check(self, x, text, timestep, given, masks) -> None:
        added = {f"added_cond_kwargs[{name!r}]": given[name] for name in ("resolution", "aspect_ratio") if given.get(name) is not None}
        check_inputs(self.pos_embed.proj, dict(hidden_states=x) | present(encoder_hidden_states=text), reals=dict(timestep=timestep) | added, masks=masks)
        config = self.config
        p = config.patch_size
        if x.dim() != 4 or x.shape[1] != config.in_channels or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"hidden_states has shape {list(x.shape)}; it should be [B, {config.in_channels}, H, W] with H and W multiples of {p}")
        batch, channels = x.shape[0], config.caption_channels or config.cross_attention_dim
        if config.cross_attention_dim is not None and (text is None or text.dim() != 3 or text.shape[0] != batch or text.shape[2] != channels):
            raise ValueError(f"encoder_hidden_states is {None if text is None else list(text.shape)}; it should be [{batch}, L, {channels}]")
        if timestep.shape != (batch,):
            raise ValueError(f"timestep has shape {list(timestep.shape)}; it should be [{batch}]")
        if config.use_additional_conditions and None in (given.get("resolution"), given.get("aspect_ratio")):
            raise ValueError(f"added_cond_kwargs has {sorted(given)}; it should have resolution and aspect_ratio")


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask of tokens [B, L], or what is added to their logits [B, 1, L], as [B, 1, 1, L]."""
    if mask is None:
        return None
    return (((1 - mask.to(dtype)) * -10000.0)[:, None] if mask.dim() == 2 else mask)[:, None]


_OFFICIAL_TOP = {"x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear", "final_layer.linear": "proj_out",
                 **{f"{theirs}.mlp.{layer}": f"adaln_single.emb.{ours}_embedder.linear_{number}"
                    for theirs, ours in (("t_embedder", "timestep"), ("csize_embedder", "resolution"), ("ar_embedder", "aspect_ratio"))
                    for layer, number in ((0, 1), (2, 2))},
                 **{f"y_embedder.y_proj.fc{number}": f"caption_projection.linear_{number}" for number in (1, 2)}}
_OFFICIAL_BLOCK = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": ("attn1.to_out.0",), "cross_attn.q_linear": ("attn2.to_q",),
                   "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"), "cross_attn.proj": ("attn2.to_out.0",), "mlp.fc1": ("ff.net.0.proj",),
                   "mlp.fc2": ("ff.net.2",)}
_NOT_OURS = ("pos_embed", "y_embedder.y_embedding")


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of PixArt-alpha's and PixArt-sigma's repositories under our (diffusers') names; packed projections are split into views.

    Left out are ``pos_embed``, of which the model makes its own, and ``y_embedder.y_embedding``, to which training dropped captions.
    Raises KeyError for a name that PixArt does not have.
    """
    out: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        if key in _NOT_OURS:
            continue
        stem, leaf = key.rsplit(".", 1)
        match = re.match(r"blocks\.(\d+)(?:\.(.*))?", stem)
        if stem in _OFFICIAL_TOP:
            out[f"{_OFFICIAL_TOP[stem]}.{leaf}"] = value
        elif key == "final_layer.scale_shift_table":
            out["scale_shift_table"] = value
        elif match and match[2] is None and leaf == "scale_shift_table":
            out[f"transformer_blocks.{match[1]}.scale_shift_table"] = value
        elif match and match[2] in _OFFICIAL_BLOCK:
            names = _OFFICIAL_BLOCK[match[2]]
            for name, part in zip(names, value.chunk(len(names))):
                out[f"transformer_blocks.{match[1]}.{name}.{leaf}"] = part
        else:
            raise KeyError(f"state_dict has {key!r}, which PixArt does not have")
    return out
