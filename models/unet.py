"""The U-Nets of latent diffusion (SD1.5, SD2, SDXL) and of Guided Diffusion (ADM), on Fusewire's ops.

Rombach et al. (2022), "High-Resolution Image Synthesis with Latent Diffusion Models"; Podell et al. (2023), "SDXL"; Dhariwal and Nichol (2021),
"Diffusion Models Beat GANs on Image Synthesis". Attribute names and state-dict keys are those of diffusers' ``UNet2DConditionModel``, and of
``UNet2DModel`` for ADM; ``models/unet_official.py`` maps the official repositories' names onto them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fusewire.models.configuration import StockConfig
from fusewire.models.cross_attention import PictureAttention
from fusewire.models.inputs import check_inputs, listed, present
from fusewire.models.layers import How, MLPEmbedder, timestep_waves
from fusewire.models.resnet import Residual, norm_activation
from fusewire.models.unet_blocks import DownBlock, MidBlock, Text, Transformer2D, UpBlock

# (attention, how the last layer resamples) of diffusers' blocks. "typed": as downsample_type and upsample_type say.
DOWN_BLOCKS = {"DownBlock2D": (None, "conv"), "CrossAttnDownBlock2D": ("cross", "conv"), "AttnDownBlock2D": ("self", "typed"),
               "ResnetDownsampleBlock2D": (None, "resnet")}
UP_BLOCKS = {"UpBlock2D": (None, "conv"), "CrossAttnUpBlock2D": ("cross", "conv"), "AttnUpBlock2D": ("self", "typed"),
             "ResnetUpsampleBlock2D": (None, "resnet")}
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)


@dataclass(frozen=True)
class UNetConfig(StockConfig):
    """Field names and defaults of diffusers' ``UNet2DConditionModel`` config, and those that only ``UNet2DModel`` has.

    ``attention_head_dim`` is, as in diffusers, the *number* of heads where pictures attend to text, and the channels of a head elsewhere.
    ``add_attention`` is of ``UNet2DModel``, whose middle block has a second residual block and between them an attention or none; None is the middle
    block of ``UNet2DConditionModel``. Block types from the outermost level on; what is a number may be a tuple with one for each level.
    """

    stock = "UNet2DConditionModel"
    fixed = dict(center_input_sample=(False,), flip_sin_to_cos=(True,), mid_block_scale_factor=(1,), dropout=(0.0,), act_fn=("silu",),
                 reverse_transformer_layers_per_block=(None,), encoder_hid_dim=(None,), encoder_hid_dim_type=(None,), num_attention_heads=(None,),
                 dual_cross_attention=(False,), class_embed_type=(None,), upcast_attention=(), resnet_skip_time_act=(False,),
                 resnet_out_scale_factor=(1.0,), time_embedding_type=("positional",), time_embedding_act_fn=(None,), timestep_post_act=(None,),
                 conv_in_kernel=(3,), conv_out_kernel=(3,), attention_type=("default",), class_embeddings_concat=(False,),
                 mid_block_only_cross_attention=(), cross_attention_norm=(), addition_embed_type_num_heads=(), num_train_timesteps=())

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
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
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attn_norm_num_groups: int | None = None
    add_attention: bool | None = None

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            types = getattr(self, name)
            if len(types) != levels or not set(types) <= set(known):
                raise ValueError(f"{name} is {types}; it should be {levels} of {sorted(known)}, as block_out_channels has {levels} levels")
        for name, known in (("mid_block_type", MID_BLOCKS), ("resnet_time_scale_shift", ("default", "scale_shift")),
                            ("addition_embed_type", (None, "text_time")), ("downsample_type", ("conv", "resnet")),
                            ("upsample_type", ("conv", "resnet"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it should be {' or '.join(map(repr, known))}")
        for name in ("layers_per_block", "only_cross_attention", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} is {value}; it should have {levels} entries, as block_out_channels has")
        if isinstance(self.attention_head_dim, tuple) and "AttnUpBlock2D" in self.up_block_types and len(set(self.attention_head_dim)) > 1:
            raise ValueError(f"attention_head_dim is {self.attention_head_dim}; it should be one number where a block is an AttnUpBlock2D")
        if self.attention_head_dim is None and self.takes_text:
            raise ValueError("attention_head_dim is None; it should be the number of heads where pictures attend to text")
        if self.addition_embed_type and None in (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim):
            raise ValueError("addition_embed_type is 'text_time'; addition_time_embed_dim and projection_class_embeddings_input_dim should be given")

    def at(self, name: str, level: int):
        """A field's value at one level."""
        value = getattr(self, name)
        return value[level] if isinstance(value, tuple) else value

    @property
    def time_channels(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def takes_text(self) -> bool:
        kinds = [DOWN_BLOCKS[name][0] for name in self.down_block_types] + [UP_BLOCKS[name][0] for name in self.up_block_types]
        return "cross" in kinds or self.mid_block_type == "UNetMidBlock2DCrossAttn"

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


class UNet(nn.Module):
    """What the denoiser predicts: noise, velocity, or noise and variance. ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: UNetConfig, numerics: str = "close"):
        super().__init__()
        self.how = how = How.of(numerics)
        self.config, self.numerics = config, numerics
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        common = Residual(config.norm_num_groups, config.norm_eps, config.time_channels, config.resnet_time_scale_shift, how)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedder(channels[0], config.time_channels, config.time_cond_proj_dim)
        self.class_embedding = nn.Embedding(config.num_class_embeds, config.time_channels) if config.num_class_embeds else None
        self.add_embedding = MLPEmbedder(config.projection_class_embeddings_input_dim, config.time_channels) if config.addition_embed_type else None

        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for level, name in enumerate(config.down_block_types):
            kind, sample = DOWN_BLOCKS[name]
            sample = config.downsample_type if sample == "typed" else sample
            self.down_blocks.append(DownBlock(channels[max(level - 1, 0)], channels[level], config.at("layers_per_block", level), common,
                                              config.attention(kind, level, how), sample if level < levels - 1 else None, config.downsample_padding))
        self.mid_block = self._middle(common)
        for step, name in enumerate(config.up_block_types):
            level = levels - 1 - step
            kind, sample = UP_BLOCKS[name]
            sample = config.upsample_type if sample == "typed" else sample
            # Of the way down each residual block gets one output of this level; the last one gets what entered the level.
            count = config.at("layers_per_block", level) + 1
            skips = [channels[level]] * (count - 1) + [channels[max(level - 1, 0)]]
            inputs = [channels[min(level + 1, levels - 1)]] + [channels[level]] * (count - 1)
            self.up_blocks.append(UpBlock([skip + own for skip, own in zip(skips, inputs)], channels[level], common,
                                          config.attention(kind, level, how), sample if level > 0 else None))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def _middle(self, common: Residual) -> MidBlock | None:
        config = self.config
        channels, last = config.block_out_channels[-1], len(config.block_out_channels) - 1
        if config.mid_block_type is None:
            return None
        kind = "cross" if config.mid_block_type == "UNetMidBlock2DCrossAttn" else "self" if config.add_attention else None
        layers = 0 if kind is None and config.add_attention is None else 1
        return MidBlock(channels, layers, common, config.attention(kind, last, self.how, middle=True))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, encoder_hidden_states: torch.Tensor | None = None,
                class_labels: torch.Tensor | None = None, timestep_cond: torch.Tensor | None = None,
                added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
                down_block_additional_residuals: Sequence[torch.Tensor] | None = None, mid_block_additional_residual: torch.Tensor | None = None,
                down_intrablock_additional_residuals: Sequence[torch.Tensor] | None = None,
                encoder_attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the network predicts for ``sample``.

        Args:
            sample: [B, in_channels, H, W], any size.
            timestep: [B], or one for all.
            encoder_hidden_states: [B, L, cross_attention_dim] text states; None where no block attends to text.
            class_labels: [B] integers, where the model has classes.
            timestep_cond: [B, time_cond_proj_dim], the embedded guidance that a model was distilled from.
            added_cond_kwargs: of SDXL, ``text_embeds`` [B, P] pooled text and ``time_ids`` [B, 6] sizes and crop; or ``vector``
                [B, projection_class_embeddings_input_dim], both assembled (``y`` of the official repository).
            down_block_additional_residuals, mid_block_additional_residual: of a ControlNet, one for each output of the way down and one for the
                middle block. The latter may come alone.
            down_intrablock_additional_residuals: of a T2I-Adapter, one for each block of the way down, SDXL's last for the middle block.
            encoder_attention_mask: [B, L], 1 for states to see and 0 for those not to.

        Returns: [B, out_channels, H, W].
        Raises: ValueError naming the argument that is missing or whose shape or device does not fit, TypeError whose dtype does not.
        """
        added = dict(added_cond_kwargs or {})
        more = present(timestep_cond=timestep_cond, mid_block_additional_residual=mid_block_additional_residual)
        for name, residuals in (("down_block_additional_residuals", down_block_additional_residuals),
                                ("down_intrablock_additional_residuals", down_intrablock_additional_residuals)):
            more |= listed(name, residuals)
        self._check(sample, encoder_hidden_states, class_labels, added, more, present(encoder_attention_mask=encoder_attention_mask))
        mask = None
        if encoder_attention_mask is not None:
            mask = ((1 - encoder_attention_mask.to(sample.dtype)) * -10000.0)[:, None, None]
        text = Text(encoder_hidden_states, mask)
        temb = self._conditioning(sample, timestep, timestep_cond, class_labels, added)
        adapted = list(down_intrablock_additional_residuals or ())

        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, left = block(x, temb, text, adapted.pop(0) if adapted else None)
            skips += left
        if down_block_additional_residuals is not None:
            if len(down_block_additional_residuals) != len(skips):
                raise ValueError(f"down_block_additional_residuals has {len(down_block_additional_residuals)} entries; it should have {len(skips)}")
            skips = [skip + residual for skip, residual in zip(skips, down_block_additional_residuals)]
        if self.mid_block is not None:
            x = self.mid_block(x, temb, text)
            if adapted and adapted[0].shape == x.shape:
                x = x + adapted[0]
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual

        # Where the size cannot be halved as often as there are levels, the way up is told the sizes that it has to meet.
        whole = not any(side % 2 ** (len(self.up_blocks) - 1) for side in sample.shape[2:])
        for block in self.up_blocks:
            below = len(skips) - len(block.resnets)
            x = block(x, skips, temb, text, None if whole or not below else skips[below - 1].shape[2:])
        return self.conv_out(norm_activation(self.conv_norm_out, self.conv_act, x, self.how))

    def _conditioning(self, sample, timestep, timestep_cond, labels, added) -> torch.Tensor:
        """The time embedding [B, E] with what joins it."""
        batch, shift = sample.shape[0], self.config.freq_shift
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(batch)
        temb = self.time_embedding(timestep_waves(timestep, self.config.block_out_channels[0], sample.dtype, shift), timestep_cond)
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(labels).to(sample.dtype)
        if self.add_embedding is not None:
            vector = added.get("vector")
            if vector is None:
                waves = timestep_waves(added["time_ids"].flatten(), self.config.addition_time_embed_dim, temb.dtype, shift)
                vector = torch.cat([added["text_embeds"].to(temb.dtype), waves.view(batch, -1)], dim=-1)
            temb = temb + self.add_embedding(vector)
        return temb

    def _check(self, sample, text, labels, added, more, masks) -> None:
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
