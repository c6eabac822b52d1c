"""The way down of the U-Nets of latent diffusion and of Guided Diffusion, with the middle block: what a U-Net and its ControlNet have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fusewire.models.configuration import StockConfig
from fusewire.models.cross_attention import PictureAttention
from fusewire.models.inputs import check_inputs, present
from fusewire.models.layers import How, MLPEmbedder, timestep_waves
from fusewire.models.resnet import Residual
from fusewire.models.unet_blocks import DownBlock, MidBlock, Text, Transformer2D

# (attention, how the last layer resamples) of diffusers' blocks. "typed": as downsample_type says.
DOWN_BLOCKS = {"DownBlock2D": (None, "conv"), "CrossAttnDownBlock2D": ("cross", "conv"), "AttnDownBlock2D": ("self", "typed"),
               "ResnetDownsampleBlock2D": (None, "resnet")}
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclass(frozen=True)
class EncoderConfig(StockConfig):
    """Field names and defaults that diffusers' configs of U-Nets and ControlNets share.

    ``attention_head_dim`` is, as in diffusers, the *number* of heads where pictures attend to text, and the channels of a head elsewhere. Block types
    from the outermost level on; what is a number may be a tuple with one for each level.
    """

    fixed = dict(mid_block_scale_factor=(1,), act_fn=("silu",), encoder_hid_dim=(None,), encoder_hid_dim_type=(None,),
                 num_attention_heads=(None,), class_embed_type=(None,), upcast_attention=(), addition_embed_type_num_heads=())

    in_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] | None = 8
    use_linear_projection: bool = False
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    num_class_embeds: int | None = None
    resnet_time_scale_shift: str = "default"

    # Fields of U-Nets alone
    up_block_types: ClassVar[tuple[str, ...]] = ()
    time_embedding_dim: ClassVar[int | None] = None
    time_cond_proj_dim: ClassVar[int | None] = None
    downsample_type: ClassVar[str] = "conv"
    attn_norm_num_groups: ClassVar[int | None] = None
    add_attention: ClassVar[bool | None] = None

    def __post_init__(self):
        levels = len(self.block_out_channels)
        self.check_blocks("down_block_types", DOWN_BLOCKS)
        for name, known in (("mid_block_type", MID_BLOCKS), ("resnet_time_scale_shift", ("default", "scale_shift")),
                            ("addition_embed_type", (None, "text_time"))):
            self.check_choice(name, known)
        for name in ("layers_per_block", "only_cross_attention", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} is {value}; it should have {levels} entries, as block_out_channels has")
        if self.attention_head_dim is None and self.takes_text:
            raise ValueError("attention_head_dim is None; it should be the number of heads where pictures attend to text")
        if self.addition_embed_type and None in (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim):
            raise ValueError("addition_embed_type is 'text_time'; addition_time_embed_dim and projection_class_embeddings_input_dim should be given")

    def check_blocks(self, name: str, known: Mapping) -> None:
        types, levels = getattr(self, name), len(self.block_out_channels)
        if len(types) != levels or not set(types) <= set(known):
            raise ValueError(f"{name} is {types}; it should be {levels} of {sorted(known)}, as block_out_channels has {levels} levels")

    def at(self, name: str, level: int):
        """A field's value at one level."""
        value = getattr(self, name)
        return value[level] if isinstance(value, tuple) else value

    @property
    def width(self) -> int:
        """Channels behind the first convolution and of the timestep's sinusoids (``model_channels`` of the official repositories)."""
        return self.block_out_channels[0]

    @property
    def time_channels(self) -> int:
        return self.time_embedding_dim or 4 * self.width

    @property
    def takes_text(self) -> bool:
        return any("CrossAttn" in (name or "") for name in (*self.down_block_types, self.mid_block_type, *self.up_block_types))

    def attention(self, kind: str | None, level: int, how: How, middle: bool = False) -> Callable[[int], nn.Module] | None:
        """What makes the attention behind a residual block of this level (the middle block is of the last); None for none."""
        channels, heads = self.block_out_channels[level], self.at("attention_head_dim", level)
        if kind is None:
            return None
        if kind == "self":
            groups = self.norm_num_groups
            if middle:  # as UNet2DModel has it
                groups = self.attn_norm_num_groups or (groups if self.resnet_time_scale_shift == "default" else None)
            return lambda index: PictureAttention(channels, channels // (heads or channels), groups, self.norm_eps, how)
        only_cross = not middle and self.at("only_cross_attention", level)
        return lambda index: Transformer2D(channels, heads, self.at("transformer_layers_per_block", level), self.at("cross_attention_dim", level),
                                           self.norm_num_groups, self.use_linear_projection, only_cross, how)


class TimestepEmbedder(MLPEmbedder):
    """Sinusoids [B, C] -> [B, E]; with ``condition_channels`` a linear of a condition (the guidance a model was distilled from) joins before."""

    def __init__(self, in_channels: int, channels: int, condition_channels: int | None):
        super().__init__(in_channels, channels)
        self.cond_proj = None if condition_channels is None else nn.Linear(condition_channels, in_channels, bias=False)

    def forward(self, waves: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(waves if condition is None else waves + self.cond_proj(condition))


class UNetEncoder(nn.Module):
    """The modules of the way down and of the middle, under diffusers' names; models call ``conditioning`` and what they need of the blocks."""

    def __init__(self, config: EncoderConfig, numerics: str):
        super().__init__()
        self.how = how = How.of(numerics)
        self.config, self.numerics = config, numerics
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        self.common = Residual(config.norm_num_groups, config.norm_eps, config.time_channels, config.resnet_time_scale_shift, how)
        self.conv_in = nn.Conv2d(config.in_channels, config.width, 3, padding=1)
        self.time_embedding = TimestepEmbedder(config.width, config.time_channels, config.time_cond_proj_dim)
        self.class_embedding = nn.Embedding(config.num_class_embeds, config.time_channels) if config.num_class_embeds else None
        self.add_embedding = MLPEmbedder(config.projection_class_embeddings_input_dim, config.time_channels) if config.addition_embed_type else None

        self.down_blocks = nn.ModuleList()
        for level, name in enumerate(config.down_block_types):
            kind, sample = DOWN_BLOCKS[name]
            sample = config.downsample_type if sample == "typed" else sample
            width = channels[level - 1] if level else config.width
            self.down_blocks.append(DownBlock(width, channels[level], config.at("layers_per_block", level), self.common,
                                              config.attention(kind, level, how), sample if level < levels - 1 else None, config.downsample_padding))
        self.mid_block = self._middle()

    def _middle(self) -> MidBlock | None:
        config = self.config
        channels, last = config.block_out_channels[-1], len(config.block_out_channels) - 1
        if config.mid_block_type is None:
            return None
        kind = "cross" if config.mid_block_type == "UNetMidBlock2DCrossAttn" else "self" if config.add_attention else None
        layers = 0 if kind is None and config.add_attention is None else 1
        return MidBlock(channels, layers, self.common, config.attention(kind, last, self.how, middle=True))

    def way_down(self, x: torch.Tensor, temb: torch.Tensor, text: Text, adapted: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """From the features [B, C, H, W] behind ``conv_in`` -> (x, what the way up will see: of ``conv_in`` and of each layer). ``adapted``: residuals
        of a T2I-Adapter, one for each block."""
        skips, adapted = [x], list(adapted)
        for block in self.down_blocks:
            x, left = block(x, temb, text, adapted.pop(0) if adapted else None)
            skips += left
        return x, skips

    def conditioning(self, sample, timestep, timestep_cond, labels, added) -> torch.Tensor:
        """The time embedding [B, E] with what joins it."""
        batch, waves_of = sample.shape[0], (self.config.freq_shift, self.config.flip_sin_to_cos)
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(batch)
        temb = self.time_embedding(timestep_waves(timestep, self.config.width, sample.dtype, *waves_of), timestep_cond)
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(labels).to(sample.dtype)
        if self.add_embedding is not None:
            vector = added.get("vector")
            if vector is None:
                waves = timestep_waves(added["time_ids"].flatten(), self.config.addition_time_embed_dim, temb.dtype, *waves_of)
                vector = torch.cat([added["text_embeds"].to(temb.dtype), waves.view(batch, -1)], dim=-1)
            temb = temb + self.add_embedding(vector)
        return temb

    def check(self, sample, text, labels, added, more, masks) -> None:
        """Raises ValueError naming the argument that is missing or whose shape or device does not fit, TypeError whose dtype does not."""
        check_inputs(self.conv_in, dict(sample=sample) | present(encoder_hidden_states=text) | more, present(class_labels=labels),
                     {f"added_cond_kwargs[{name!r}]": added[name] for name in ("text_embeds", "time_ids", "vector") if added.get(name) is not None}, masks)
        config = self.config
        if sample.dim() != 4 or sample.shape[1] != config.in_channels:
            raise ValueError(f"sample has shape {list(sample.shape)}; it should be [B, {config.in_channels}, H, W]")
        batch = sample.shape[0]
        if config.takes_text:
            channels = config.at("cross_attention_dim", 0)
            if text is None or text.dim() != 3 or text.shape[0] != batch or text.shape[2] != channels:
                raise ValueError(f"encoder_hidden_states is {None if text is None else list(text.shape)}; it should be [{batch}, L, {channels}]")
        if (config.num_class_embeds is not None) != (labels is not None) or labels is not None and labels.shape != (batch,):
            raise ValueError(f"class_labels is {None if labels is None else list(labels.shape)}; "
                             f"it should be {None if config.num_class_embeds is None else [batch]}, as num_class_embeds is {config.num_class_embeds}")
        if config.addition_embed_type and not ("vector" in added or {"text_embeds", "time_ids"} <= set(added)):
            raise ValueError(f"added_cond_kwargs has {sorted(added)}; it should have text_embeds and time_ids, or vector")
