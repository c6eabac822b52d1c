"""DiT, the class-conditional transformer, on Fusewire's ops.

Peebles and Xie (2023), "Scalable Diffusion Models with Transformers". Attribute names and state-dict keys are those of diffusers'
``DiTTransformer2DModel``, which embeds timestep and label in each block anew; ``from_official`` maps the names of facebookresearch/DiT, which
embeds them once, onto them.
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
from fusewire.models.inputs import check_inputs
from fusewire.models.layers import AdaLayerNormZero, How, MLPEmbedder, ada_layer_norm_zero, linear, norm_input, timestep_waves
from fusewire.models.patches import PatchEmbed, unpatchify
from fusewire.models.transformer_block import zero_block


@dataclass(frozen=True)
class DiTConfig(StockConfig):
    """Field names and defaults of diffusers' ``DiTTransformer2DModel`` config, plus ``freq_shift``.

    Weights of the official repository want ``norm_eps=1e-6`` and ``freq_shift=0`` (sinusoids of the timestep whose last frequency stays above
    1 / 10000); diffusers has 1e-5 and 1.
    """

    stock = "DiTTransformer2DModel"
    # No GroupNorm here has groups, and PyTorch's attention, which diffusers calls, knows no upcast
    fixed = dict(dropout=(0.0,), norm_num_groups=(), activation_fn=("gelu-approximate",), upcast_attention=(),
                 norm_type=("ada_norm_zero",), norm_elementwise_affine=(False,))

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5
    freq_shift: int = 1

    def __post_init__(self):
        if self.sample_size % self.patch_size:
            raise ValueError(f"sample_size is {self.sample_size}; it should be a multiple of patch_size = {self.patch_size}")
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def null_class(self) -> int:
        """The label that stands for none: what classifier-free guidance contrasts with, and what training drops labels to."""
        return self.num_embeds_ada_norm


class LabelEmbedding(nn.Module):
    """Labels [B] -> [B, C]. The last row is the null class; labels are dropped by the caller, who puts it there."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, channels)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return self.embedding_table(labels)


class TimeLabelEmbed(nn.Module):
    """(timestep [B], labels [B]) -> conditioning [B, C]."""

    WAVES = 256

    def __init__(self, classes: int, channels: int, freq_shift: int):
        super().__init__()
        self.freq_shift = freq_shift
        self.timestep_embedder = MLPEmbedder(self.WAVES, channels)
        self.class_embedder = LabelEmbedding(classes, channels)

    def forward(self, timestep: torch.Tensor, class_labels: torch.Tensor, hidden_dtype: torch.dtype) -> torch.Tensor:
        return self.timestep_embedder(timestep_waves(timestep, self.WAVES, hidden_dtype, self.freq_shift)) + self.class_embedder(class_labels)


class LabelledAdaLayerNormZero(AdaLayerNormZero):
    """adaLN-Zero that embeds its conditioning itself."""

    def __init__(self, channels: int, classes: int, freq_shift: int, how: How):
        super().__init__(channels, 6, how)
        self.emb = TimeLabelEmbed(classes, channels, freq_shift)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, hidden_dtype: torch.dtype):
        return ada_layer_norm_zero(self, x, self.emb(timestep, class_labels, hidden_dtype), self.how)


class DiTBlock(nn.Module):
    """Self-attention and feed-forward under adaLN-Zero."""

    def __init__(self, config: DiTConfig, how: How):
        super().__init__()
        self.how, channels = how, config.inner_dim
        self.norm1 = LabelledAdaLayerNormZero(channels, config.num_embeds_ada_norm, config.freq_shift, how)
        self.attn1 = CrossAttention(channels, config.num_attention_heads, config.attention_head_dim, bias=config.attention_bias, how=how)
        self.norm3 = nn.LayerNorm(channels, elementwise_affine=False, eps=config.norm_eps)
        self.ff = FeedForward(channels, 4 * channels, how)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """(tokens [B, T, C], timestep [B], labels [B]) -> [B, T, C]."""
        return zero_block(self, hidden_states, self.how, timestep, class_labels)


class DiT(nn.Module):
    """The noise, and where ``out_channels`` is twice ``in_channels`` also the variance, predicted by DiT. ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: DiTConfig, numerics: str = "close"):
        super().__init__()
        self.how = how = How.of(numerics)
        self.config, self.numerics = config, numerics
        channels = config.inner_dim
        self.pos_embed = PatchEmbed(config.patch_size, config.in_channels, channels, None, config.sample_size // config.patch_size)
        self.transformer_blocks = nn.ModuleList(DiTBlock(config, how) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(channels, 2 * channels)
        self.proj_out_2 = nn.Linear(channels, config.patch_size**2 * config.out_channels)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """What the network predicts for ``hidden_states``.

        Args:
            hidden_states: [B, in_channels, H, W] latents; H and W multiples of the patch size.
            timestep: [B], 0 to 999.
            class_labels: [B] integers, 0 to ``num_embeds_ada_norm``; the last is the null class.

        Returns: [B, out_channels, H, W]; with a learned variance the second half of the channels.
        Raises: ValueError naming the argument whose shape or device does not fit, TypeError whose dtype does not.
        """
        self._check(hidden_states, timestep, class_labels)
        p, (height, width) = self.config.patch_size, hidden_states.shape[-2:]
        x = self.pos_embed(hidden_states).contiguous()
        for block in self.transformer_blocks:
            x = block(x, timestep, class_labels)
        conditioning = self.transformer_blocks[0].norm1.emb(timestep, class_labels, x.dtype)
        shift, scale = linear(self.proj_out_1, F.silu(conditioning), self.how).chunk(2, dim=1)
        x = ops.adaln_modulate(norm_input(x), shift, scale, eps=self.norm_out.eps, numerics=self.how.numerics)
        return unpatchify(linear(self.proj_out_2, x, self.how), height // p, width // p, p)

    def forward_with_cfg(self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, cfg_scale: float,
                         guided_channels: int = 3) -> torch.Tensor:
        """``forward`` under classifier-free guidance as the official repository samples with it (Ho and Salimans, 2022).

        The first half of the batch has labels and the second the null class; both see the latents of the first half. Of the noise only the first
        ``guided_channels`` are guided, 3 of 4 in the official code (so that published samples can be reproduced); the other channels, and the
        variance, stay what each half predicted. Shapes as in ``forward``, with an even batch.
        """
        if hidden_states.shape[0] % 2:
            raise ValueError(f"hidden_states has shape {list(hidden_states.shape)}; it should hold a half with labels and a half without")
        out = self(hidden_states.chunk(2)[0].repeat(2, 1, 1, 1), timestep, class_labels)
        guided, rest = out[:, :guided_channels], out[:, guided_channels:]
        labelled, null = guided.chunk(2)
        return torch.cat([(null + cfg_scale * (labelled - null)).repeat(2, 1, 1, 1), rest], dim=1)

    def _check(self, x, timestep, labels) -> None:
        check_inputs(self.pos_embed.proj, dict(hidden_states=x), dict(class_labels=labels), dict(timestep=timestep))
        channels, p = self.config.in_channels, self.config.patch_size
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(f"hidden_states has shape {list(x.shape)}; it should be [B, {channels}, H, W] with H and W multiples of {p}")
        for name, value in (("timestep", timestep), ("class_labels", labels)):
            if value.shape != x.shape[:1]:
                raise ValueError(f"{name} has shape {list(value.shape)}; it should be {list(x.shape[:1])}")


_OFFICIAL_BLOCK = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
_OFFICIAL_TOP = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2"}
_OFFICIAL_EMBED = {"t_embedder.mlp.0": "timestep_embedder.linear_1", "t_embedder.mlp.2": "timestep_embedder.linear_2",
                   "y_embedder.embedding_table": "class_embedder.embedding_table"}


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of facebookresearch's DiT under our (diffusers') names; see ``DiTConfig`` for the two settings that it wants.

    Each block gets the one embedding of timestep and label; packed qkv are split into views. ``pos_embed``, sinusoids that were never trained, is
    left out: the model has its own. Raises KeyError for a name that DiT does not have.
    """
    depth = 1 + max((int(match[1]) for key in state_dict if (match := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    if not depth:
        raise KeyError("state_dict has no blocks.0.*, which every DiT has")
    out: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        if key == "pos_embed":
            continue
        stem, leaf = key.rsplit(".", 1)
        match = re.match(r"blocks\.(\d+)\.(.*)", stem)
        if stem in _OFFICIAL_TOP:
            out[f"{_OFFICIAL_TOP[stem]}.{leaf}"] = value
        elif stem in _OFFICIAL_EMBED:
            for index in range(depth):
                out[f"transformer_blocks.{index}.norm1.emb.{_OFFICIAL_EMBED[stem]}.{leaf}"] = value
        elif match and match[2] == "attn.qkv":
            for name, third in zip("qkv", value.chunk(3)):
                out[f"transformer_blocks.{match[1]}.attn1.to_{name}.{leaf}"] = third
        elif match and match[2] in _OFFICIAL_BLOCK:
            out[f"transformer_blocks.{match[1]}.{_OFFICIAL_BLOCK[match[2]]}.{leaf}"] = value
        else:
            raise KeyError(f"state_dict has {key!r}, which DiT does not have")
    return out
