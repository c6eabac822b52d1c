"""MMDiT, the transformer of Stable Diffusion 3 and 3.5, on Fusewire's ops.

Esser et al. (2024), "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis"; SD3.5's dual attention follows the published code
of Stability-AI/sd3.5. Attribute names, state-dict keys, chunk orders and token order ([image, text]) are those of diffusers'
``SD3Transformer2DModel``; ``from_official`` maps the official repository's names onto them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fusewire.models.attention import Attention
from fusewire.models.configuration import StockConfig
from fusewire.models.feed_forward import FeedForward, feed_forward_residual
from fusewire.models.inputs import check_inputs, check_residuals, listed, present
from fusewire.models.ip_adapter_sd3 import TimedPictures, pictures_of
from fusewire.models.layers import AdaLayerNormContinuous, AdaLayerNormZero, How, TimeTextEmbed, for_all, gate_residual_norm, linear
from fusewire.models.patches import PatchEmbed, unpatchify


@dataclass(frozen=True)
class MMDiTConfig(StockConfig):
    """Field names and defaults of diffusers' ``SD3Transformer2DModel`` config, plus ``mlp_ratio``."""

    stock = "SD3Transformer2DModel"

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    mlp_ratio: float = 4.0

    def __post_init__(self):
        if self.num_layers < 1:
            raise ValueError(f"num_layers is {self.num_layers}; it should be at least 1")
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}; it should be None or 'rms_norm'")
        if self.caption_projection_dim != self.inner_dim:
            raise ValueError(f"caption_projection_dim is {self.caption_projection_dim}; it should be num_attention_heads * attention_head_dim "
                             f"= {self.inner_dim}")
        object.__setattr__(self, "dual_attention_layers", tuple(self.dual_attention_layers))
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class JointTransformerBlock(nn.Module):
    """One MMDiT block over an image stream and a text stream; the last block (``context_pre_only``) returns no text stream."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float, qk_norm: str | None, context_pre_only: bool, use_dual_attention: bool, how: How):
        super().__init__()
        self.context_pre_only, self.use_dual_attention, self.how = context_pre_only, use_dual_attention, how
        hidden = int(channels * mlp_ratio)
        self.norm1 = AdaLayerNormZero(channels, 9 if use_dual_attention else 6, how)
        self.norm1_context = AdaLayerNormContinuous(channels, how) if context_pre_only else AdaLayerNormZero(channels, 6, how)
        self.attn = Attention(channels, heads, qk_norm, context=True, pre_only=context_pre_only, how=how)
        self.attn2 = Attention(channels, heads, qk_norm, context=False, how=how) if use_dual_attention else None
        self.norm2 = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(channels, hidden, how)
        self.norm2_context = None if context_pre_only else nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.ff_context = None if context_pre_only else FeedForward(channels, hidden, how)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor, pictures: TimedPictures | None = None):
        """(image [B, T, C], text [B, L, C], conditioning [B, C], what an IP-Adapter sees) -> (text or None, image)."""
        return joint_block(self, hidden_states, encoder_hidden_states, temb, self.how, None if pictures is None else dict(pictures=pictures))


def joint_block(block, x, context, temb, how: How, attention_kwargs: Mapping | None = None):
    """The forward of a block: our own, and of diffusers' ``JointTransformerBlock``. Submodules are called; their gates and norms are fused.

    ``attention_kwargs``: more keywords for the attention layers.
    """
    x, context = for_all(max(x.shape[0], context.shape[0], temb.shape[0]), x, context)
    more = attention_kwargs or {}
    y2 = gate_msa2 = None
    if block.use_dual_attention:
        y, gate_msa, shift_mlp, scale_mlp, gate_mlp, y2, gate_msa2 = block.norm1(x, emb=temb)
    else:
        y, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, emb=temb)
    if block.context_pre_only:
        y_context = block.norm1_context(context, temb)
    else:
        y_context, c_gate_msa, c_shift_mlp, c_scale_mlp, c_gate_mlp = block.norm1_context(context, emb=temb)

    # Names are bound anew, so that no tensor is kept beyond its last use: the feed-forwards are where memory is fullest
    y, y_context = block.attn(hidden_states=y, encoder_hidden_states=y_context, **more)
    if y2 is not None:
        y2 = block.attn2(hidden_states=y2, **more)
    x, y, y2 = *gate_residual_norm(block.norm2, x, y, gate_msa, shift_mlp, scale_mlp, how, y2, gate_msa2), None
    x = feed_forward_residual(block.ff, y, gate_mlp, x, how)
    if block.context_pre_only:
        return None, x
    context, y = gate_residual_norm(block.norm2_context, context, y_context, c_gate_msa, c_shift_mlp, c_scale_mlp, how)
    del y_context
    return feed_forward_residual(block.ff_context, y, c_gate_mlp, context, how), x


def check_latents(config: MMDiTConfig, x: torch.Tensor, table_size: int | None) -> None:
    """[B, in_channels, H, W]: whole patches, not more along a side than a table of positions has."""
    p = config.patch_size
    if x.dim() != 4 or x.shape[1] != config.in_channels or x.shape[2] % p or x.shape[3] % p or table_size is not None and max(x.shape[2:]) > table_size * p:
        raise ValueError(f"hidden_states has shape {list(x.shape)}; it should be [B, {config.in_channels}, H, W] with H and W multiples of {p}"
                         + ("" if table_size is None else f", at most {table_size * p}"))


def check_conditions(config: MMDiTConfig, batch: int, context: torch.Tensor | None, pooled: torch.Tensor, timestep: torch.Tensor) -> None:
    """Text, pooled text and timestep of ``batch`` samples; a text of None is not looked at."""
    if context is not None and (context.dim() != 3 or context.shape[0] != batch or context.shape[2] != config.joint_attention_dim):
        raise ValueError(f"encoder_hidden_states has shape {list(context.shape)}; it should be [{batch}, L, {config.joint_attention_dim}]")
    for name, value, shape in (("pooled_projections", pooled, (batch, config.pooled_projection_dim)), ("timestep", timestep, (batch,))):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}; it should be {list(shape)}")


class MMDiT(nn.Module):
    """The velocity field of SD3/SD3.5. ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: MMDiTConfig, numerics: str = "close"):
        super().__init__()
        self.how = how = How.of(numerics)
        self.config, self.numerics = config, numerics
        channels = config.inner_dim
        self.pos_embed = PatchEmbed(config.patch_size, config.in_channels, channels, config.pos_embed_max_size,
                                    config.sample_size // config.patch_size)
        self.time_text_embed = TimeTextEmbed(channels, config.pooled_projection_dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, channels)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(channels, config.num_attention_heads, config.mlp_ratio, config.qk_norm,
                                  context_pre_only=i == config.num_layers - 1, use_dual_attention=i in config.dual_attention_layers, how=how)
            for i in range(config.num_layers))
        self.norm_out = AdaLayerNormContinuous(channels, how)
        self.proj_out = nn.Linear(channels, config.patch_size**2 * config.out_channels)
        self.image_proj: nn.Module | None = None  # an IP-Adapter's projection

    def picture_layers(self) -> dict[int, str]:
        """The attentions that an IP-Adapter extends, all of them, by their number in an official checkpoint."""
        names = [f"transformer_blocks.{index}.{name}" for index, block in enumerate(self.transformer_blocks) for name in ("attn", "attn2")
                 if getattr(block, name) is not None]
        return dict(enumerate(names))

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, pooled_projections: torch.Tensor, timestep: torch.Tensor,
                block_controlnet_hidden_states: list[torch.Tensor] | None = None, skip_layers: Iterable[int] | None = None,
                ip_adapter_image_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """The velocity at ``hidden_states``.

        Args:
            hidden_states: [B, in_channels, H, W] latents; H and W multiples of the patch size, at most ``pos_embed_max_size`` patches.
            encoder_hidden_states: [B, L, joint_attention_dim] text states.
            pooled_projections: [B, pooled_projection_dim] pooled text.
            timestep: [B], 0 to 1000 (1000 times the noise level sigma).
            block_controlnet_hidden_states: residuals [B, T, C], spread over the blocks and added behind each but the last.
            skip_layers: indices of blocks to leave out (skip-layer guidance).
            ip_adapter_image_embeds: [B, L, C] an encoder's states of a picture, or of several in a row, where there is an IP-Adapter
                (``ip_adapter.attach``).

        Returns: [B, out_channels, H, W].
        Raises: ValueError naming the argument whose shape or device does not fit, TypeError whose dtype does not.
        """
        self._check(hidden_states, encoder_hidden_states, pooled_projections, timestep, block_controlnet_hidden_states, ip_adapter_image_embeds)
        pictures = pictures_of(self.image_proj, "ip_adapter_image_embeds", ip_adapter_image_embeds, timestep)
        (height, width), p = hidden_states.shape[-2:], self.config.patch_size
        skip = frozenset(skip_layers or ())
        x = self.pos_embed(hidden_states).contiguous()
        temb = self.time_text_embed(timestep, pooled_projections)
        context = linear(self.context_embedder, encoder_hidden_states, self.how)
        for index, block in enumerate(self.transformer_blocks):
            if index not in skip:
                context, x = block(x, context, temb, pictures)
            if block_controlnet_hidden_states is not None and not block.context_pre_only:
                interval = len(self.transformer_blocks) / len(block_controlnet_hidden_states)
                x = x + block_controlnet_hidden_states[int(index / interval)]
        x = linear(self.proj_out, self.norm_out(x, temb), self.how)
        return unpatchify(x, height // p, width // p, p)

    def _check(self, x, context, pooled, timestep, residuals, embeds) -> None:
        check_inputs(self.pos_embed.proj, dict(hidden_states=x, encoder_hidden_states=context, pooled_projections=pooled)
                     | listed("block_controlnet_hidden_states", residuals) | present(ip_adapter_image_embeds=embeds), reals=dict(timestep=timestep))
        config, p = self.config, self.config.patch_size
        check_latents(config, x, config.pos_embed_max_size)
        check_conditions(config, x.shape[0], context, pooled, timestep)
        check_residuals("block_controlnet_hidden_states", residuals, (x.shape[0], (x.shape[2] // p) * (x.shape[3] // p), config.inner_dim))

    def init_weights(self) -> None:
        """The initialisation for training of Peebles and Xie (2023): Xavier for the linears, zero for every modulation and for the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:  # an IP-Adapter's have none
                    nn.init.zeros_(module.bias)
        patches = self.pos_embed.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
        nn.init.zeros_(patches.bias)
        for embedder in (self.time_text_embed.timestep_embedder, self.time_text_embed.text_embedder):
            nn.init.normal_(embedder.linear_1.weight, std=0.02)
            nn.init.normal_(embedder.linear_2.weight, std=0.02)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1_context.linear.weight)
        nn.init.zeros_(self.norm_out.linear.weight)
        nn.init.zeros_(self.proj_out.weight)


# Official name -> our name, for the parts of a joint block that are renamed only.
OFFICIAL_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear", "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.proj": "attn.to_out.0", "context_block.attn.proj": "attn.to_add_out", "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q", "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
}
OFFICIAL_QKV = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
_OFFICIAL_TOP = {
    "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1", "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_PREFIX = "model.diffusion_model."


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of Stability-AI's MMDiTX under our (diffusers') names.

    A ``model.diffusion_model.`` prefix is dropped, and with it whatever in a full checkpoint is not the transformer. Packed qkv are split; the final
    layer and the last context block, which chunk shift, scale officially, are turned to scale, shift. Tensors are views where possible.
    Raises KeyError for a name that MMDiTX does not have.
    """
    if any(key.startswith(_PREFIX) for key in state_dict):
        state_dict = {key[len(_PREFIX):]: value for key, value in state_dict.items() if key.startswith(_PREFIX)}
    depth = 1 + max((int(match[1]) for key in state_dict if (match := re.match(r"joint_blocks\.(\d+)\.", key))), default=-1)
    if not depth:
        raise KeyError("state_dict has no joint_blocks.0.*, which every MMDiTX has")
    out: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        if key == "pos_embed":
            out["pos_embed.pos_embed"] = value
            continue
        stem, leaf = key.rsplit(".", 1)
        match = re.match(r"joint_blocks\.(\d+)\.(.*)", stem)
        if match is None:
            if stem not in _OFFICIAL_TOP:
                raise KeyError(f"state_dict has {key!r}, which MMDiTX does not have")
            out[f"{_OFFICIAL_TOP[stem]}.{leaf}"] = _scale_first(value) if stem == "final_layer.adaLN_modulation.1" else value
            continue
        index, part = int(match[1]), match[2]
        block = f"transformer_blocks.{index}"
        if part in OFFICIAL_QKV:
            for name, third in zip(OFFICIAL_QKV[part], value.chunk(3)):
                out[f"{block}.{name}.{leaf}"] = third
        elif part in OFFICIAL_BLOCK:
            pre_only = part == "context_block.adaLN_modulation.1" and index == depth - 1
            out[f"{block}.{OFFICIAL_BLOCK[part]}.{leaf}"] = _scale_first(value) if pre_only else value
        else:
            raise KeyError(f"state_dict has {key!r}, which MMDiTX does not have")
    return out


def _scale_first(value: torch.Tensor) -> torch.Tensor:
    shift, scale = value.chunk(2)
    return torch.cat([scale, shift])
