"""T2I-Adapter: from a control picture, the features that are added to a U-Net's stages.

Mou et al. (2023), "T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image Diffusion Models". Attribute names and state-dict
keys are those of diffusers' ``T2IAdapter``; ``from_official`` maps the names of TencentARC/T2I-Adapter onto them. Convolutions, ReLU and sums, once a
picture: there is nothing to fuse, and channels-last convolutions, which are no faster here, would sum float32 three times less accurately.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fusewire.models.configuration import StockConfig
from fusewire.models.inputs import check_inputs

KINDS = ("full_adapter", "full_adapter_xl", "light_adapter")


@dataclass(frozen=True)
class AdapterConfig(StockConfig):
    """Field names and defaults of diffusers' ``T2IAdapter`` config. A light adapter has one stage more than ``channels``, as wide as the last."""

    stock = "T2IAdapter"

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))
        if self.adapter_type not in KINDS:
            raise ValueError(f"adapter_type is {self.adapter_type!r}; it should be one of {', '.join(map(repr, KINDS))}")


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


class Residual(nn.Module):
    """x + convolution(relu(convolution(x))); the second one ``kernel`` wide."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.block1 = _convolution(channels, channels, 3)
        self.act = nn.ReLU()
        self.block2 = _convolution(channels, channels, kernel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block2(self.act(self.block1(x))) + x


class Stage(nn.Module):
    """[B, C, H, W] -> [B, C', H or H / 2, W or W / 2]; a ``light`` one works in a quarter of the channels."""

    def __init__(self, inputs: int, outputs: int, blocks: int, down: bool, light: bool):
        super().__init__()
        self.downsample = nn.AvgPool2d(2, ceil_mode=True) if down else None
        inner = outputs // 4 if light else outputs
        self.in_conv = _convolution(inputs, inner, 1) if light or inputs != outputs else None
        self.resnets = nn.Sequential(*(Residual(inner, 3 if light else 1) for _ in range(blocks)))
        self.out_conv = _convolution(inner, outputs, 1) if light else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in (self.downsample, self.in_conv, self.resnets, self.out_conv):
            x = x if part is None else part(x)
        return x


class _Body(nn.Module):
    """What diffusers keeps under ``adapter``."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        light, xl = config.adapter_type == "light_adapter", config.adapter_type == "full_adapter_xl"
        self.unshuffle = nn.PixelUnshuffle(config.downscale_factor)
        inputs, widths = config.in_channels * config.downscale_factor**2, config.channels
        if light:
            widths = (*widths, widths[-1])
        else:
            self.conv_in = _convolution(inputs, widths[0], 3)
            inputs = widths[0]
        down = [index == 2 if xl else index > 0 for index in range(len(widths))]
        # The last stages of the XL form take their own width
        wide = [widths[index] if xl and index > 2 else (inputs, *widths)[index] for index in range(len(widths))]
        self.body = nn.ModuleList(Stage(*sizes, config.num_res_blocks, halved, light) for *sizes, halved in zip(wide, widths, down))


class Adapter(nn.Module):
    """diffusers' ``T2IAdapter``."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config, self.adapter = config, _Body(config)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[B, in_channels, H, W] -> the features [B, C, h, w] after each stage. ValueError where the size, the channels or the device does
        not fit, TypeError where the dtype does not."""
        check_inputs(next(module for module in self.adapter.modules() if isinstance(module, nn.Conv2d)), dict(x=x))
        factor = self.config.downscale_factor
        if x.dim() != 4 or x.shape[1] != self.config.in_channels or x.shape[2] % factor or x.shape[3] % factor:
            raise ValueError(f"x has shape {list(x.shape)}; it should be [B, {self.config.in_channels}, H, W] with H and W multiples of {factor}")
        x, features = self.adapter.unshuffle(x), []
        if hasattr(self.adapter, "conv_in"):
            x = self.adapter.conv_in(x)
        for stage in self.adapter.body:
            x = stage(x)
            features.append(x)
        return features


def from_official(state_dict: Mapping[str, torch.Tensor], num_res_blocks: int = 2) -> dict[str, torch.Tensor]:
    """The state dict of TencentARC's ``Adapter``, ``Adapter_XL`` or ``Adapter_light`` under our (diffusers') names.

    Raises KeyError for a name that they do not have, as those with learned skips or strided convolutions in place of pooling do.
    """
    out = {}
    for key, value in state_dict.items():
        light = re.fullmatch(r"body\.(\d+)\.(body\.(\d+)\.block[12]|in_conv|out_conv)\.(weight|bias)", key)
        full = re.fullmatch(r"body\.(\d+)\.(block[12]|in_conv)\.(weight|bias)", key)
        if "body.0.in_conv.weight" in state_dict and light:
            name = key.replace(".body.", ".resnets.")
        elif full:
            stage, block = divmod(int(full[1]), num_res_blocks)
            name = f"body.{stage}." + ("" if full[2] == "in_conv" else f"resnets.{block}.") + f"{full[2]}.{full[3]}"
        elif key in ("conv_in.weight", "conv_in.bias"):
            name = key
        else:
            raise KeyError(f"state_dict has {key!r}, which a T2I-Adapter does not have")
        out[f"adapter.{name}"] = value
    return out
