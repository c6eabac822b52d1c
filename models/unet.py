"""The U-Nets of latent diffusion (SD1.5, SD2, SDXL), of DDPM and of Guided Diffusion (ADM), on Fusewire's ops.

Rombach et al. (2022), "High-Resolution Image Synthesis with Latent Diffusion Models"; Podell et al. (2023), "SDXL"; Ho et al. (2020), "Denoising Diffusion
Probabilistic Models"; Dhariwal and Nichol (2021), "Diffusion Models Beat GANs on Image Synthesis". Attribute names and state-dict keys are those of
diffusers' ``UNet2DConditionModel``, and of ``UNet2DModel`` for DDPM and ADM; ``models/unet_official.py`` maps the official repositories' names onto them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fusewire.models.inputs import listed, present
from fusewire.models.ip_adapter import pictures_of
from fusewire.models.resnet import norm_activation
from fusewire.models.unet_blocks import Text, UpBlock
from fusewire.models.unet_encoder import EncoderConfig, UNetEncoder

# (attention, how the last layer resamples) of diffusers' blocks. "typed": as upsample_type says.
UP_BLOCKS = {"UpBlock2D": (None, "conv"), "CrossAttnUpBlock2D": ("cross", "conv"), "AttnUpBlock2D": ("self", "typed"),
             "ResnetUpsampleBlock2D": (None, "resnet")}
IMAGE_EMBEDS = "added_cond_kwargs['image_embeds']"


@dataclass(frozen=True)
class UNetConfig(EncoderConfig):
    """Field names and defaults of diffusers' ``UNet2DConditionModel`` config, and those that only ``UNet2DModel`` has.

    ``add_attention`` is of ``UNet2DModel``, whose middle block has a second residual block and between them an attention or none; None is the middle
    block of ``UNet2DConditionModel``.
    """

    stock = "UNet2DConditionModel"
    fixed = dict(EncoderConfig.fixed, center_input_sample=(False,), dropout=(0.0,), reverse_transformer_layers_per_block=(None,),
                 dual_cross_attention=(False,), resnet_skip_time_act=(False,), resnet_out_scale_factor=(1.0,), time_embedding_type=("positional",),
                 time_embedding_act_fn=(None,), timestep_post_act=(None,), conv_in_kernel=(3,), conv_out_kernel=(3,), attention_type=("default",),
                 class_embeddings_concat=(False,), mid_block_only_cross_attention=(), cross_attention_norm=(), num_train_timesteps=())

    sample_size: int | tuple[int, int] | None = None
    out_channels: int = 4
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    attn_norm_num_groups: int | None = None
    add_attention: bool | None = None

    def __post_init__(self):
        self.check_blocks("up_block_types", UP_BLOCKS)
        super().__post_init__()
        for name in ("downsample_type", "upsample_type"):
            self.check_choice(name, ("conv", "resnet"))
        if isinstance(self.attention_head_dim, tuple) and "AttnUpBlock2D" in self.up_block_types and len(set(self.attention_head_dim)) > 1:
            raise ValueError(f"attention_head_dim is {self.attention_head_dim}; it should be one number where a block is an AttnUpBlock2D")


class UNet(UNetEncoder):
    """What the denoiser predicts: noise, velocity, or noise and variance. ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: UNetConfig, numerics: str = "close"):
        super().__init__(config, numerics)
        channels, levels = config.block_out_channels, len(config.block_out_channels)
        self.up_blocks = nn.ModuleList()
        for step, name in enumerate(config.up_block_types):
            level = levels - 1 - step
            kind, sample = UP_BLOCKS[name]
            sample = config.upsample_type if sample == "typed" else sample
            # Of the way down each residual block gets one output of this level; the last one gets what entered the level.
            count = config.at("layers_per_block", level) + 1
            skips = [channels[level]] * (count - 1) + [channels[max(level - 1, 0)]]
            inputs = [channels[min(level + 1, levels - 1)]] + [channels[level]] * (count - 1)
            self.up_blocks.append(UpBlock([skip + own for skip, own in zip(skips, inputs)], channels[level], self.common,
                                          config.attention(kind, level, self.how), sample if level > 0 else None))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=config.norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self.encoder_hid_proj: nn.Module | None = None  # IP-Adapters' projections

    def picture_layers(self) -> dict[int, str]:
        """The attentions to text, which IP-Adapters extend, by their number in an official checkpoint: the way down, the way up, the middle."""
        parts = [(part, getattr(self, part)) for part in ("down_blocks", "up_blocks", "mid_block")]
        names = [f"{part}.{name}" for part, module in parts if module is not None for name, _ in module.named_modules() if name.endswith(".attn2")]
        return {2 * index + 1: name for index, name in enumerate(names)}

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, encoder_hidden_states: torch.Tensor | None = None,
                class_labels: torch.Tensor | None = None, timestep_cond: torch.Tensor | None = None,
                added_cond_kwargs: Mapping[str, torch.Tensor | Sequence[torch.Tensor]] | None = None,
                down_block_additional_residuals: Sequence[torch.Tensor] | None = None, mid_block_additional_residual: torch.Tensor | None = None,
                down_intrablock_additional_residuals: Sequence[torch.Tensor] | None = None,
                encoder_attention_mask: torch.Tensor | None = None, ip_adapter_masks: Sequence[torch.Tensor | None] | None = None) -> torch.Tensor:
        """What the network predicts for ``sample``.

        Args:
            sample: [B, in_channels, H, W], any size.
            timestep: [B], or one for all.
            encoder_hidden_states: [B, L, cross_attention_dim] text states; None where no block attends to text.
            class_labels: [B] integers, where the model has classes.
            timestep_cond: [B, time_cond_proj_dim], the embedded guidance that a model was distilled from.
            added_cond_kwargs: of SDXL, ``text_embeds`` [B, P] pooled text and ``time_ids`` [B, 6] sizes and crop; or ``vector``
                [B, projection_class_embeddings_input_dim], both assembled (``y`` of the official repository). Of IP-Adapters (``ip_adapter.attach``),
                ``image_embeds``: for each of them [B, N, C], or [B, N, L, C] of those that take an encoder's tokens, of N pictures.
            down_block_additional_residuals, mid_block_additional_residual: of a ControlNet, one for each output of the way down and one for the
                middle block. The latter may come alone.
            down_intrablock_additional_residuals: of a T2I-Adapter, one for each block of the way down, SDXL's last for the middle block.
            encoder_attention_mask: [B, L], 1 for states to see and 0 for those not to.
            ip_adapter_masks: for each IP-Adapter [B or 1, N, H', W'], where each of its pictures counts (of the picture's aspect), or None for everywhere.

        Returns: [B, out_channels, H, W].
        Raises: ValueError naming the argument that is missing or whose shape or device does not fit, TypeError whose dtype does not.
        """
        added = dict(added_cond_kwargs or {})
        more = present(timestep_cond=timestep_cond, mid_block_additional_residual=mid_block_additional_residual,
                       **listed("ip_adapter_masks", ip_adapter_masks))
        for name, tensors in (("down_block_additional_residuals", down_block_additional_residuals),
                              ("down_intrablock_additional_residuals", down_intrablock_additional_residuals),
                              (IMAGE_EMBEDS, added.get("image_embeds"))):
            more |= listed(name, tensors)
        self.check(sample, encoder_hidden_states, class_labels, added, more, present(encoder_attention_mask=encoder_attention_mask))
        pictures = pictures_of(self.encoder_hid_proj, IMAGE_EMBEDS, added.get("image_embeds"), sample.shape[0], ip_adapter_masks)
        mask = None
        if encoder_attention_mask is not None:
            mask = ((1 - encoder_attention_mask.to(sample.dtype)) * -10000.0)[:, None, None]
        text = Text(encoder_hidden_states, mask, pictures)
        temb = self.conditioning(sample, timestep, timestep_cond, class_labels, added)
        adapted = down_intrablock_additional_residuals or ()

        x, skips = self.way_down(self.conv_in(sample), temb, text, adapted)
        if down_block_additional_residuals is not None:
            if len(down_block_additional_residuals) != len(skips):
                raise ValueError(f"down_block_additional_residuals has {len(down_block_additional_residuals)} entries; it should have {len(skips)}")
            skips = [skip + residual for skip, residual in zip(skips, down_block_additional_residuals)]
        if self.mid_block is not None:
            x = self.mid_block(x, temb, text)
            left = adapted[len(self.down_blocks):]
            if left and left[0].shape == x.shape:
                x = x + left[0]
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual

        # Where the size cannot be halved as often as there are levels, the way up is told the sizes that it has to meet.
        whole = not any(side % 2 ** (len(self.up_blocks) - 1) for side in sample.shape[2:])
        for block in self.up_blocks:
            below = len(skips) - len(block.resnets)
            x = block(x, skips, temb, text, None if whole or not below else skips[below - 1].shape[2:])
        return self.conv_out(norm_activation(self.conv_norm_out, self.conv_act, x, self.how))
