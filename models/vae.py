"""The KL autoencoder of latent diffusion, on Fusewire's ops: of SD, SDXL, SD3 and FLUX.1.

Rombach et al. (2022), "High-Resolution Image Synthesis with Latent Diffusion Models". Attribute names and state-dict keys are those of diffusers'
``AutoencoderKL``; ``from_official`` maps the names of latent-diffusion, generative-models and flux onto them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from fusewire.models.configuration import StockConfig
from fusewire.models.cross_attention import PictureAttention
from fusewire.models.inputs import check_inputs
from fusewire.models.layers import How
from fusewire.models.resnet import Residual, norm_activation
from fusewire.models.tiling import tiled
from fusewire.models.unet_blocks import DownBlock, MidBlock, UpBlock

EPS = 1e-6  # of every norm


@dataclass(frozen=True)
class AutoencoderKLConfig(StockConfig):
    """Field names and defaults of diffusers' ``AutoencoderKL`` config."""

    stock = "AutoencoderKL"
    # How many blocks there are, block_out_channels says
    fixed = dict(act_fn=("silu",), latents_mean=(None,), latents_std=(None,))

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            want = (kind,) * len(self.block_out_channels)
            if getattr(self, name) != want:
                raise ValueError(f"{name} is {getattr(self, name)}; it should be {want}")

    @property
    def downscale(self) -> int:
        """Pixels along the side of a latent."""
        return 2 ** (len(self.block_out_channels) - 1)


def _mid(config: AutoencoderKLConfig, common: Residual) -> MidBlock:
    channels = config.block_out_channels[-1]
    attention = partial(PictureAttention, channels, 1, config.norm_num_groups, EPS, common.how)
    return MidBlock(channels, 1, common, (lambda index: attention()) if config.mid_block_add_attention else None)


class Encoder(nn.Module):
    """[B, in_channels, H, W] -> mean and log-variance, [B, 2 * latent_channels, H / downscale, W / downscale]."""

    def __init__(self, config: AutoencoderKLConfig, how: How):
        super().__init__()
        self.how, channels = how, config.block_out_channels
        common = Residual(config.norm_num_groups, EPS, how=how)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[max(index - 1, 0)], out, config.layers_per_block, common, downsample=None if index == len(channels) - 1 else "conv",
                      padding=0)
            for index, out in enumerate(channels))
        self.mid_block = _mid(config, common)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x, _ = block(x)
        return self.conv_out(norm_activation(self.conv_norm_out, self.conv_act, self.mid_block(x), self.how))


class Decoder(nn.Module):
    """[B, latent_channels, h, w] -> [B, out_channels, h * downscale, w * downscale]."""

    def __init__(self, config: AutoencoderKLConfig, how: How):
        super().__init__()
        self.how, channels = how, config.block_out_channels[::-1]
        common = Residual(config.norm_num_groups, EPS, how=how)
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _mid(config, common)
        self.up_blocks = nn.ModuleList(
            UpBlock([channels[max(index - 1, 0)]] + [out] * config.layers_per_block, out, common,
                    upsample=None if index == len(channels) - 1 else "conv")
            for index, out in enumerate(channels))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], eps=EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(norm_activation(self.conv_norm_out, self.conv_act, x, self.how))


class Posterior(NamedTuple):
    """A normal distribution of latents [B, C, h, w], independent in each element; the log-variance is kept in [-30, 20]."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """``mean + std * noise``; the caller supplies the noise."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


class AutoencoderKL(nn.Module):
    """Pictures to latents and back. ``numerics`` as in ``fusewire.swap``.

    ``use_slicing`` takes a batch one by one; ``use_tiling`` takes pictures larger than ``sample_size`` in overlapping tiles of that size, which are
    blended.
    """

    tile_overlap = 0.25

    def __init__(self, config: AutoencoderKLConfig, numerics: str = "close"):
        super().__init__()
        how = How.of(numerics)
        self.config, self.numerics = config, numerics
        self.use_slicing = self.use_tiling = False
        latents = config.latent_channels
        self.encoder, self.decoder = Encoder(config, how), Decoder(config, how)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.use_post_quant_conv else None

    def encode(self, x: torch.Tensor) -> Posterior:
        """Pictures [B, in_channels, H, W] in [-1, 1] -> the distribution of their latents, before ``scale``.

        Raises: ValueError naming ``x`` where its shape or device does not fit, TypeError where its dtype does not.
        """
        _check(self.encoder.conv_in, "x", x, self.config.in_channels, self.config.downscale)
        mean, logvar = self._run(x, self._encode, self.config.sample_size, self._latent_tile).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents [B, latent_channels, h, w], after ``unscale``, -> pictures [B, out_channels, h * downscale, w * downscale].

        Raises: ValueError naming ``z`` where its shape or device does not fit, TypeError where its dtype does not.
        """
        _check(self.post_quant_conv or self.decoder.conv_in, "z", z, self.config.latent_channels, 1)
        return self._run(z, self._decode, self._latent_tile, self.config.sample_size)

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Pictures there and back: by the mean, or by the sample that ``noise`` [B, latent_channels, h, w] makes."""
        posterior = self.encode(x)
        return self.decode(posterior.mean if noise is None else posterior.sample(noise))

    def scale(self, z: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder makes them -> as the denoiser wants them."""
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def unscale(self, z: torch.Tensor) -> torch.Tensor:
        """The way back from ``scale``."""
        return z / self.config.scaling_factor + (self.config.shift_factor or 0.0)

    @property
    def wants_float32(self) -> bool:
        """Weights that overflow in float16 (SDXL's) say so by ``force_upcast``; pipelines then turn the autoencoder to float32 for a decode."""
        return self.config.force_upcast and self.decoder.conv_in.weight.dtype is torch.float16

    @property
    def _latent_tile(self) -> int:
        return self.config.sample_size // self.config.downscale

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encoder(x)
        return x if self.quant_conv is None else self.quant_conv(x)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _run(self, x: torch.Tensor, way, tile: int, result: int) -> torch.Tensor:
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([self._run(one, way, tile, result) for one in x.split(1)])
        if self.use_tiling and max(x.shape[-2:]) > tile:
            return tiled(x, way, tile, result, self.tile_overlap)
        return way(x)


def _check(entrance: nn.Module, name: str, x: torch.Tensor, channels: int, multiple: int) -> None:
    check_inputs(entrance, {name: x})
    if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < multiple:
        raise ValueError(f"{name} has shape {list(x.shape)}; it should be [B, {channels}, H, W] with H and W at least {multiple}")


_OFFICIAL_NAMES = [  # parts of a name, in this order
    (r"^(encoder|decoder)\.mid\.block_([12])\.", lambda m: f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}."),
    (r"^(encoder|decoder)\.mid\.attn_1\.", r"\1.mid_block.attentions.0."),
    (r"^encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.down_blocks.\1.resnets.\2."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.up_blocks.\1.resnets.\2."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"(attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.0)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.0)\.proj_out\.", r"\1.to_out.0."),
]
_PREFIX = "first_stage_model."


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of an official autoencoder under our (diffusers') names: levels of the decoder are counted from the latents on, and the 1x1
    convolutions of the attention are linears.

    A ``first_stage_model.`` prefix is dropped, and with it whatever in a full checkpoint is not the autoencoder. Tensors are views.
    Raises KeyError where there is no decoder among them.
    """
    if any(key.startswith(_PREFIX) for key in state_dict):
        state_dict = {key[len(_PREFIX):]: value for key, value in state_dict.items() if key.startswith(_PREFIX)}
    last = max((int(match[1]) for key in state_dict if (match := re.match(r"decoder\.up\.(\d+)\.", key))), default=-1)
    if last < 0:
        raise KeyError("state_dict has no decoder.up.0.*, which every such autoencoder has")
    out: dict[str, torch.Tensor] = {}
    for key, value in state_dict.items():
        name = re.sub(r"^(decoder\.up\.)(\d+)", lambda m: f"{m[1]}{last - int(m[2])}", key)
        for pattern, ours in _OFFICIAL_NAMES:
            name = re.sub(pattern, ours, name)
        out[name] = value.flatten(1) if "attentions.0.to_" in name and value.dim() == 4 else value
    return out
