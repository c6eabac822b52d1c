"""The transformer of FLUX.1, on Fusewire's ops.

Black Forest Labs (2024), "FLUX.1"; Batifol et al. (2025), "FLUX.1 Kontext". Blocks of two streams as in MMDiT (Esser et al., 2024), then blocks of
one stream whose attention and MLP run side by side (Dehghani et al., 2023). Attribute names, state-dict keys and chunk orders are those of diffusers'
``FluxTransformer2DModel``; ``from_official`` maps the official repository's names onto them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fusewire.kernels.dispatch import recording
from fusewire.models.configuration import StockConfig
from fusewire.models.feed_forward import FeedForward, feed_forward_residual
from fusewire.models.flux_attention import FluxAttention
from fusewire.models.inputs import check_inputs, check_residuals, listed, present
from fusewire.models.ip_adapter import Pictures, pictures_of
from fusewire.models.layers import (AdaLayerNormContinuous, AdaLayerNormZero, How, TimeTextEmbed, for_all, gate_residual_norm, gated_linear, linear,
                                    untouched)

FLOAT16_LIMIT = 65504  # float16 residuals are kept finite, as stock keeps them


@dataclass(frozen=True)
class FluxConfig(StockConfig):
    """Field names and defaults of diffusers' ``FluxTransformer2DModel`` config, plus ``mlp_ratio``."""

    stock = "FluxTransformer2DModel"

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    mlp_ratio: float = 4.0

    def __post_init__(self):
        object.__setattr__(self, "axes_dims_rope", tuple(self.axes_dims_rope))
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(f"axes_dims_rope is {self.axes_dims_rope}; its sum should be attention_head_dim = {self.attention_head_dim}")
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


def rope_tables(ids: torch.Tensor, dims: Sequence[int], theta: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [T, axes] -> (cos, sin), each float32 [T, sum(dims)], every value twice, as diffusers hands them to blocks. Angles are float64."""
    parts = []
    for position, dim in zip(ids.unbind(-1), dims, strict=True):
        omega = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim)
        parts.append(torch.outer(position.to(torch.float64), omega))
    angle = torch.cat(parts, dim=-1).repeat_interleave(2, dim=-1)
    return angle.cos().float(), angle.sin().float()


class FluxTransformerBlock(nn.Module):
    """A block over an image stream and a text stream."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float, how: How):
        super().__init__()
        self.how, hidden = how, int(channels * mlp_ratio)
        self.norm1, self.norm1_context = AdaLayerNormZero(channels, 6, how), AdaLayerNormZero(channels, 6, how)
        self.attn = FluxAttention(channels, heads, context=True, how=how)
        self.norm2 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(channels, hidden, how)
        self.norm2_context = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.ff_context = FeedForward(channels, hidden, how)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, image_rotary_emb,
                pictures: Pictures | None = None):
        """(image [B, T, C], text [B, L, C], conditioning [B, C], tables, what IP-Adapters see) -> (text, image)."""
        more = None if pictures is None else dict(pictures=pictures)
        return double_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, self.how, more)


def double_block(block, x, context, temb, rope, how: How, attention_kwargs: Mapping | None = None):
    """The forward of a block of two streams: our own, and diffusers'. Submodules are called; their gates and norms are fused.

    A third output of the attention (an IP-Adapter's) is added to the image stream at the end, as stock does.
    """
    x, context = for_all(max(x.shape[0], context.shape[0], temb.shape[0]), x, context)
    y, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, emb=temb)
    y_context, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = block.norm1_context(context, emb=temb)
    attended, attended_context, *adapted = block.attn(hidden_states=y, encoder_hidden_states=y_context, image_rotary_emb=rope, **(attention_kwargs or {}))
    x, y = gate_residual_norm(block.norm2, x, attended, gate_msa, shift_mlp, scale_mlp, how)
    x = feed_forward_residual(block.ff, y, gate_mlp, x, how)
    if adapted:
        x = x + adapted[0]
    context, y = gate_residual_norm(block.norm2_context, context, attended_context, c_gate_msa, c_shift_mlp, c_scale_mlp, how)
    return _kept_finite(feed_forward_residual(block.ff_context, y, c_gate_mlp, context, how)), x


class FluxSingleTransformerBlock(nn.Module):
    """A block over [text, image] as one stream; attention and MLP see the same norm and leave through one projection."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float, how: How):
        super().__init__()
        self.how, hidden = how, int(channels * mlp_ratio)
        self.norm = AdaLayerNormZero(channels, 3, how)
        self.proj_mlp = nn.Linear(channels, hidden)
        self.act_mlp = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(channels + hidden, channels)
        self.attn = FluxAttention(channels, heads, context=False, how=how)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, image_rotary_emb):
        """(image [B, T, C], text [B, L, C], conditioning [B, C], tables) -> (text, image)."""
        return single_block(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, self.how)


def one_stream(context: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[context, x] along the tokens; uncopied where they are the two parts of one tensor still, as the block before returned them."""
    if not recording() and context.dtype is x.dtype and context.device == x.device and context.shape[::2] == x.shape[::2]:
        batch, tokens, channels = context.shape[0], context.shape[1] + x.shape[1], context.shape[2]
        strides = (tokens * channels, channels, 1)
        if (context.stride() == x.stride() == strides and context.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
                and x.storage_offset() == context.storage_offset() + context.shape[1] * channels):
            return context.as_strided((batch, tokens, channels), strides)
    return torch.cat([context, x], dim=1)


def single_block(block, x, context, temb, rope, how: How, attention_kwargs: Mapping | None = None):
    """The forward of a block of one stream: our own, and diffusers'."""
    tokens = context.shape[1]
    x = one_stream(*for_all(max(x.shape[0], context.shape[0], temb.shape[0]), context, x))
    y, gate = block.norm(x, emb=temb)
    activation = block.act_mlp
    if type(activation) is nn.GELU and activation.approximate == "tanh" and untouched(activation):
        hidden = linear(block.proj_mlp, y, how, activation="gelu_tanh")
    else:
        hidden = activation(block.proj_mlp(y))
    attended = block.attn(hidden_states=y, image_rotary_emb=rope, **(attention_kwargs or {}))
    x = _kept_finite(gated_linear(block.proj_out, torch.cat([attended, hidden], dim=2), gate, x, how))
    return x[:, :tokens], x[:, tokens:]


def _kept_finite(x: torch.Tensor) -> torch.Tensor:
    return x.clip(-FLOAT16_LIMIT, FLOAT16_LIMIT) if x.dtype is torch.float16 else x


class FluxTrunk(nn.Module):
    """What the transformer and its ControlNet have in common: the embedders and the blocks."""

    def __init__(self, config: FluxConfig, numerics: str = "close"):
        super().__init__()
        self.how = how = How.of(numerics)
        self.config, self.numerics = config, numerics
        channels, heads = config.inner_dim, config.num_attention_heads
        self.time_text_embed = TimeTextEmbed(channels, config.pooled_projection_dim, guidance=config.guidance_embeds)
        self.context_embedder = nn.Linear(config.joint_attention_dim, channels)
        self.x_embedder = nn.Linear(config.in_channels, channels)
        self.transformer_blocks = nn.ModuleList(FluxTransformerBlock(channels, heads, config.mlp_ratio, how) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(channels, heads, config.mlp_ratio, how) for _ in range(config.num_single_layers))

    def conditioning(self, timestep: torch.Tensor, pooled: torch.Tensor, guidance: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """-> [B, C]; ``dtype``: that of the image stream, to which steps and scales are rounded."""
        scale = (lambda value: None if value is None else value.to(dtype) * 1000)
        return self.time_text_embed(scale(timestep), pooled, scale(guidance))

    def check(self, x, context, pooled, timestep, img_ids, txt_ids, guidance, floats: Mapping[str, torch.Tensor] = {},
              integers: Mapping[str, torch.Tensor] = {}) -> None:
        """``floats``, ``integers``: more tensors, of which only dtype and device are looked at."""
        check_inputs(self.x_embedder, dict(hidden_states=x, encoder_hidden_states=context, pooled_projections=pooled) | floats, integers,
                     reals=dict(timestep=timestep, img_ids=img_ids, txt_ids=txt_ids) | present(guidance=guidance))
        config = self.config
        if x.dim() != 3 or x.shape[2] != config.in_channels:
            raise ValueError(f"hidden_states has shape {list(x.shape)}; it should be [B, T, {config.in_channels}]")
        batch, axes = x.shape[0], len(config.axes_dims_rope)
        if context.dim() != 3 or context.shape[0] != batch or context.shape[2] != config.joint_attention_dim:
            raise ValueError(f"encoder_hidden_states has shape {list(context.shape)}; it should be [{batch}, L, {config.joint_attention_dim}]")
        for name, value, shape in (("pooled_projections", pooled, (batch, config.pooled_projection_dim)), ("timestep", timestep, (batch,)),
                                   ("img_ids", img_ids, (x.shape[1], axes)), ("txt_ids", txt_ids, (context.shape[1], axes))):
            if value.shape != shape:
                raise ValueError(f"{name} has shape {list(value.shape)}; it should be {list(shape)}")
        if (guidance is not None) != config.guidance_embeds or guidance is not None and guidance.shape != (batch,):
            raise ValueError(f"guidance is {'None' if guidance is None else list(guidance.shape)}; "
                             f"it should be {[batch] if config.guidance_embeds else None}, as guidance_embeds is {config.guidance_embeds}")


class Flux(FluxTrunk):
    """The velocity field of FLUX.1 (dev, schnell, Kontext, Fill). ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: FluxConfig, numerics: str = "close"):
        super().__init__(config, numerics)
        self.norm_out = AdaLayerNormContinuous(config.inner_dim, self.how)
        self.proj_out = nn.Linear(config.inner_dim, config.patch_size**2 * config.out_channels)
        self.encoder_hid_proj: nn.Module | None = None  # IP-Adapters' projections

    def picture_layers(self) -> dict[int, str]:
        """The attentions that IP-Adapters extend, by their number in an official checkpoint."""
        return {index: f"transformer_blocks.{index}.attn" for index in range(len(self.transformer_blocks))}

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, pooled_projections: torch.Tensor, timestep: torch.Tensor,
                img_ids: torch.Tensor, txt_ids: torch.Tensor, guidance: torch.Tensor | None = None,
                controlnet_block_samples: Sequence[torch.Tensor] | None = None,
                controlnet_single_block_samples: Sequence[torch.Tensor] | None = None, controlnet_blocks_repeat: bool = False,
                ip_adapter_image_embeds: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """The velocity at ``hidden_states``.

        Args:
            hidden_states: [B, T, in_channels] packed latents (2 x 2 pixels of 16 channels are a token).
            encoder_hidden_states: [B, L, joint_attention_dim] text states.
            pooled_projections: [B, pooled_projection_dim] pooled text.
            timestep: [B], 0 to 1. guidance: [B], the scale that a model with ``guidance_embeds`` was distilled from.
            img_ids, txt_ids: [T, axes] and [L, axes], the position of each token along each axis.
            controlnet_block_samples, controlnet_single_block_samples: residuals [B, T, C], spread over the blocks of each kind and added behind them.
            controlnet_blocks_repeat: those of ``controlnet_block_samples`` are not spread but taken in turn, as XLabs' ControlNets want it.
            ip_adapter_image_embeds: for each IP-Adapter (``ip_adapter.attach``) [B, N, C] of N pictures.

        Returns: [B, T, out_channels].
        Raises: ValueError naming the argument whose shape or device does not fit, or ``guidance`` where the model wants it or not; TypeError naming
            one whose dtype does not fit.
        """
        residuals = dict(controlnet_block_samples=controlnet_block_samples, controlnet_single_block_samples=controlnet_single_block_samples)
        self.check(hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance,
                   {key: one for name, tensors in (residuals | dict(ip_adapter_image_embeds=ip_adapter_image_embeds)).items()
                    for key, one in listed(name, tensors).items()})
        for name, tensors in residuals.items():
            check_residuals(name, tensors, (*hidden_states.shape[:2], self.config.inner_dim))
        pictures = pictures_of(self.encoder_hid_proj, "ip_adapter_image_embeds", ip_adapter_image_embeds, hidden_states.shape[0])
        x = linear(self.x_embedder, hidden_states, self.how)
        temb = self.conditioning(timestep, pooled_projections, guidance, x.dtype)
        context = linear(self.context_embedder, encoder_hidden_states, self.how)
        rope = rope_tables(torch.cat([txt_ids, img_ids]), self.config.axes_dims_rope)
        for blocks, samples, repeat, more in ((self.transformer_blocks, controlnet_block_samples, controlnet_blocks_repeat, (pictures,)),
                                              (self.single_transformer_blocks, controlnet_single_block_samples, False, ())):
            for index, block in enumerate(blocks):
                context, x = block(x, context, temb, rope, *more)
                if samples is not None:
                    x = x + samples[index % len(samples) if repeat else index // -(-len(blocks) // len(samples))]
        return linear(self.proj_out, self.norm_out(x, temb), self.how)


_STREAMS = {"img": ("norm1", "attn.to_q attn.to_k attn.to_v", "attn.norm_q", "attn.norm_k", "attn.to_out.0", "ff"),
            "txt": ("norm1_context", "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "attn.norm_added_q", "attn.norm_added_k", "attn.to_add_out",
                    "ff_context")}
OFFICIAL_INPUTS = {"img_in": "x_embedder", "txt_in": "context_embedder",
                   **{f"{theirs}.{layer}_layer": f"time_text_embed.{ours}_embedder.linear_{number}"
                      for theirs, ours in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance"))
                      for layer, number in (("in", 1), ("out", 2))}}


def _official_double() -> dict[str, tuple[str, ...]]:
    found = {}
    for stream, (norm, qkv, norm_q, norm_k, out, ff) in _STREAMS.items():
        found |= {f"{stream}_mod.lin": (f"{norm}.linear",), f"{stream}_attn.qkv": tuple(qkv.split()), f"{stream}_attn.norm.query_norm": (norm_q,),
                  f"{stream}_attn.norm.key_norm": (norm_k,), f"{stream}_attn.proj": (out,), f"{stream}_mlp.0": (f"{ff}.net.0.proj",),
                  f"{stream}_mlp.2": (f"{ff}.net.2",)}
    return found


_OFFICIAL_DOUBLE = _official_double()
_OFFICIAL_SINGLE = {"modulation.lin": ("norm.linear",), "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",),
                    "norm.query_norm": ("attn.norm_q",), "norm.key_norm": ("attn.norm_k",)}


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of black-forest-labs' ``Flux`` under our (diffusers') names.

    Packed projections are split into views; the final layer, which chunks shift, scale officially, is turned to scale, shift.
    Raises KeyError for a name that Flux does not have.
    """
    out = renamed(state_dict, OFFICIAL_INPUTS | {"final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear"}, "Flux")
    return {key: torch.cat(value.chunk(2)[::-1]) if key.startswith("norm_out.linear.") else value for key, value in out.items()}


def renamed(state_dict: Mapping[str, torch.Tensor], top: Mapping[str, str], model: str) -> dict[str, torch.Tensor]:
    """An official state dict under our names: of blocks, and by ``top`` {official: ours} of the other layers. KeyError for a name that ``model`` lacks."""
    out: dict[str, torch.Tensor] = {}
    channels = state_dict["img_in.weight"].shape[0]
    for key, value in state_dict.items():
        stem, leaf = key.rsplit(".", 1)
        match = re.match(r"(double|single)_blocks\.(\d+)\.(.*)", stem)
        if stem in top:
            out[f"{top[stem]}.{leaf}"] = value
        elif match and match[3] in (names := _OFFICIAL_DOUBLE if match[1] == "double" else _OFFICIAL_SINGLE):
            block = f"{'single_' if match[1] == 'single' else ''}transformer_blocks.{match[2]}"
            parts = names[match[3]]
            sizes = [channels] * 3 + [len(value) - 3 * channels] * (len(parts) == 4) if len(parts) > 1 else [len(value)]
            for name, part in zip(parts, value.split(sizes)):
                out[f"{block}.{name}.{'weight' if leaf == 'scale' else leaf}"] = part
        else:
            raise KeyError(f"state_dict has {key!r}, which {model} does not have")
    return out
