"""The ControlNets of Stable Diffusion 3 and 3.5: an MMDiT's first blocks that see a control picture, and give what is added behind the MMDiT's own.

Zhang, Rao and Agrawala (2023), "Adding Conditional Control to Text-to-Image Diffusion Models", on the blocks of Esser et al. (2024). Attribute names and
state-dict keys are those of diffusers' ``SD3ControlNetModel``, in the forms that were published: SD3's, which see the text (InstantX; alimama's, which has
a mask beside the picture), and SD3.5-large's, which do not (Stability AI, whose own names ``from_official`` maps onto them). Picture and residuals join at
zero: trained from ``load_state_dict(mmdit.state_dict(), strict=False)``, one of fewer blocks than the MMDiT begins by changing nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fusewire.models.attention import Attention
from fusewire.models.feed_forward import FeedForward, feed_forward_residual
from fusewire.models.inputs import check_inputs, present
from fusewire.models.layers import AdaLayerNormZero, How, TimeTextEmbed, gate_residual_norm, linear, zeroed
from fusewire.models.mmdit import OFFICIAL_BLOCK, OFFICIAL_QKV, JointTransformerBlock, MMDiTConfig, check_conditions, check_latents
from fusewire.models.patches import PatchEmbed, Patches


@dataclass(frozen=True)
class SD3ControlNetConfig(MMDiTConfig):
    """Field names and defaults of diffusers' ``SD3ControlNetModel`` config, plus ``mlp_ratio``. ``out_channels`` has no effect.

    ``joint_attention_dim`` None: blocks without text, for which ``caption_projection_dim``, ``qk_norm`` and ``dual_attention_layers`` have no effect.
    ``use_pos_embed`` False: it takes tokens, with no embedding of latents; ``pos_embed_type`` None: that embedding has no positions.
    ``force_zeros_for_pooled_projection``: it was trained with zeros for the pooled text, which are for the caller to give.
    """

    stock = "SD3ControlNetModel"

    joint_attention_dim: int | None = 4096
    pos_embed_max_size: int | None = 96
    extra_conditioning_channels: int = 0
    pos_embed_type: str | None = "sincos"
    use_pos_embed: bool = True
    force_zeros_for_pooled_projection: bool = True

    def __post_init__(self):
        if self.joint_attention_dim is None:
            object.__setattr__(self, "caption_projection_dim", self.inner_dim)
        super().__post_init__()
        self.check_choice("pos_embed_type", (None, "sincos"))
        if self.has_positions and not self.pos_embed_max_size:
            raise ValueError(f"pos_embed_max_size is {self.pos_embed_max_size}; it should be the side of the table of positions, in patches")

    @property
    def has_positions(self) -> bool:
        return self.use_pos_embed and self.pos_embed_type is not None


class SD3SingleTransformerBlock(nn.Module):
    """A block over the image stream alone."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float, how: How):
        super().__init__()
        self.how = how
        self.norm1 = AdaLayerNormZero(channels, 6, how)
        self.attn = Attention(channels, heads, None, context=False, how=how)
        self.norm2 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(channels, int(channels * mlp_ratio), how)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """(image [B, T, C], conditioning [B, C]) -> image."""
        return single_block(self, hidden_states, temb, self.how)


def single_block(block, x, temb, how: How) -> torch.Tensor:
    """The forward of a block without text: our own, and of diffusers' ``SD3SingleTransformerBlock``."""
    y, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, emb=temb)
    x, y = gate_residual_norm(block.norm2, x, block.attn(hidden_states=y, encoder_hidden_states=None), gate_msa, shift_mlp, scale_mlp, how)
    return feed_forward_residual(block.ff, y, gate_mlp, x, how)


class SD3ControlNet(nn.Module):
    """diffusers' ``SD3ControlNetModel``. ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: SD3ControlNetConfig, numerics: str = "close"):
        super().__init__()
        self.how = how = How.of(numerics)
        self.config, self.numerics = config, numerics
        p, channels, heads = config.patch_size, config.inner_dim, config.num_attention_heads
        self.pos_embed = None
        if config.has_positions:
            self.pos_embed = PatchEmbed(p, config.in_channels, channels, config.pos_embed_max_size, config.sample_size // p)
        elif config.use_pos_embed:
            self.pos_embed = Patches(p, config.in_channels, channels)
        self.time_text_embed = TimeTextEmbed(channels, config.pooled_projection_dim)
        if config.joint_attention_dim is None:
            self.context_embedder = None
            blocks = (SD3SingleTransformerBlock(channels, heads, config.mlp_ratio, how) for _ in range(config.num_layers))
        else:
            self.context_embedder = nn.Linear(config.joint_attention_dim, channels)
            blocks = (JointTransformerBlock(channels, heads, config.mlp_ratio, config.qk_norm, context_pre_only=False,
                                            use_dual_attention=index in config.dual_attention_layers, how=how) for index in range(config.num_layers))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.controlnet_blocks = nn.ModuleList(zeroed(nn.Linear(channels, channels)) for _ in range(config.num_layers))
        self.pos_embed_input = zeroed(Patches(p, config.in_channels + config.extra_conditioning_channels, channels))

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None, pooled_projections: torch.Tensor, timestep: torch.Tensor,
                controlnet_cond: torch.Tensor, conditioning_scale: float = 1.0) -> list[torch.Tensor]:
        """What is added inside the MMDiT that predicts from the same latents.

        Args:
            hidden_states: [B, in_channels, H, W] latents; H and W multiples of the patch size, at most ``pos_embed_max_size`` patches. With
                ``use_pos_embed`` False [B, T, C] tokens, what the MMDiT's ``pos_embed`` gives for them, unless that was assigned to ``self.pos_embed``.
            encoder_hidden_states: [B, L, joint_attention_dim] text states; None where ``joint_attention_dim`` is None.
            pooled_projections: [B, pooled_projection_dim] pooled text.
            timestep: [B], 0 to 1000.
            controlnet_cond: [B or 1, in_channels + extra_conditioning_channels, H, W] the control picture's latents.
            conditioning_scale: factor of all that is returned.

        Returns: one [B, T, C] for each block, the MMDiT's ``block_controlnet_hidden_states``.
        Raises: ValueError naming the argument that is missing or whose shape or device does not fit, TypeError whose dtype does not.
        """
        self._check(hidden_states, encoder_hidden_states, pooled_projections, timestep, controlnet_cond)
        self._check_picture(hidden_states, controlnet_cond)
        x = hidden_states if self.pos_embed is None else self.pos_embed(hidden_states)
        x = x + self.pos_embed_input(controlnet_cond)
        # A product's bits in 16 bits depend on how its input lies: stock's stream lies as this sum does, whose convolutions put channels before tokens
        channels_first = self.how.numerics == "exact" and not x.is_contiguous()
        x = x.contiguous()
        temb = self.time_text_embed(timestep, pooled_projections)
        context = None if self.context_embedder is None else linear(self.context_embedder, encoder_hidden_states, self.how)
        residuals = []
        for block, outlet in zip(self.transformer_blocks, self.controlnet_blocks):
            if context is None:
                x = block(x, temb)
            else:
                context, x = block(x, context, temb)
            residuals.append(linear(outlet, x.mT.contiguous().mT if channels_first else x, self.how) * conditioning_scale)
        return residuals

    def _check(self, x, context, pooled, timestep, picture) -> None:
        config = self.config
        check_inputs(self.pos_embed_input.proj, dict(hidden_states=x, pooled_projections=pooled)
                     | present(encoder_hidden_states=context, controlnet_cond=picture), reals=dict(timestep=timestep))
        if self.pos_embed is not None:
            check_latents(config, x, self.pos_embed.pos_embed_max_size)
        elif x.dim() != 3 or x.shape[2] != config.inner_dim:
            raise ValueError(f"hidden_states has shape {list(x.shape)}; it should be [B, T, {config.inner_dim}], tokens, as there is no pos_embed")
        if (context is None) != (config.joint_attention_dim is None):
            wanted = f"[{x.shape[0]}, L, {config.joint_attention_dim}]" if context is None else "None"
            raise ValueError(f"encoder_hidden_states is {None if context is None else list(context.shape)}; it should be {wanted}, "
                             f"as joint_attention_dim is {config.joint_attention_dim}")
        check_conditions(config, x.shape[0], context, pooled, timestep)

    def _check_picture(self, x: torch.Tensor, picture: torch.Tensor | None) -> None:
        batch, p, channels = x.shape[0], self.config.patch_size, self.config.in_channels + self.config.extra_conditioning_channels
        shape = [0] if picture is None else list(picture.shape)
        if x.dim() == 4:
            fits, wanted = shape[1:] == [channels, *x.shape[2:]], [batch, channels, *x.shape[2:]]
        else:
            fits = len(shape) == 4 and shape[1] == channels and not shape[2] % p and not shape[3] % p and shape[2] * shape[3] == x.shape[1] * p**2
            wanted = f"[{batch}, {channels}, H, W], {x.shape[1]} patches of {p} x {p}"
        if not fits or shape[0] not in (1, batch):
            raise ValueError(f"controlnet_cond is {None if picture is None else shape}; it should be {wanted}")


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a ControlNet of SD3.5-large, as Stability AI published them, under our (diffusers') names.

    For a config with ``joint_attention_dim=None``, ``use_pos_embed=False``, ``pos_embed_max_size=None`` and ``pooled_projection_dim=2048``. Packed qkv are
    split into views; an embedding of latents (``pos_embed.proj``), which is the MMDiT's there, is left out.
    Raises KeyError for a name that these ControlNets do not have.
    """
    out: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        stem, leaf = key.rsplit(".", 1)
        match = re.match(r"transformer_blocks\.(\d+)\.(.*)", stem)
        part = f"x_block.{match[2]}" if match else None
        if stem == "pos_embed.proj":
            continue
        if part in OFFICIAL_QKV:
            for name, third in zip(OFFICIAL_QKV[part], value.chunk(3)):
                out[f"transformer_blocks.{match[1]}.{name}.{leaf}"] = third
        elif part in OFFICIAL_BLOCK:
            out[f"transformer_blocks.{match[1]}.{OFFICIAL_BLOCK[part]}.{leaf}"] = value
        elif re.fullmatch(r"controlnet_blocks\.\d+|pos_embed_input\.proj|time_text_embed\.(timestep|text)_embedder\.linear_[12]", stem):
            out[key] = value
        else:
            raise KeyError(f"state_dict has {key!r}, which the ControlNets of SD3.5-large do not have")
    return out
