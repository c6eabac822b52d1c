"""ControlNet: a copy of a U-Net's way down that sees a control picture, and gives what is added to the U-Net's skips and middle.

Zhang, Rao and Agrawala (2023), "Adding Conditional Control to Text-to-Image Diffusion Models". Attribute names and state-dict keys are those of diffusers'
``ControlNetModel``, of SD1.5, SD2 and SDXL; ``from_official`` maps the names of lllyasviel/ControlNet onto them. What joins the U-Net begins at zero, so a
ControlNet trained from ``load_state_dict(unet.state_dict(), strict=False)`` begins by changing nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fusewire.models.inputs import present
from fusewire.models.layers import zeroed
from fusewire.models.unet_blocks import Text
from fusewire.models.unet_encoder import EncoderConfig, UNetEncoder
from fusewire.models.unet_official import ENCODER_TOP, encoder_layers, renamed


@dataclass(frozen=True)
class ControlNetConfig(EncoderConfig):
    """Field names and defaults of diffusers' ``ControlNetModel`` config. ``conditioning_embedding_out_channels``: of the control picture's features, each
    at half the size of the one before. ``global_pool_conditions``: the residuals are their means over the picture."""

    stock = "ControlNetModel"

    conditioning_channels: int = 3
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("controlnet_conditioning_channel_order", ("rgb", "bgr"))
        if self.mid_block_type is None:
            raise ValueError("mid_block_type is None; it should be 'UNetMidBlock2DCrossAttn' or 'UNetMidBlock2D': a ControlNet has a middle")

    @property
    def downscale_factor(self) -> int:
        """How many pixels of the control picture there are along one of the latents."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class ConditioningEmbedding(nn.Module):
    """The control picture [B, C, f H, f W] -> features [B, C', H, W]: convolutions with SiLU between, every other one halves the size."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], out_channels: int):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in zip(widths, widths[1:]):
            self.blocks.extend([nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, wider, 3, padding=1, stride=2)])
        self.conv_out = zeroed(nn.Conv2d(widths[-1], out_channels, 3, padding=1))

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        x = F.silu(self.conv_in(picture))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)


class ControlNet(UNetEncoder):
    """diffusers' ``ControlNetModel``. ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: ControlNetConfig, numerics: str = "close"):
        super().__init__(config, numerics)
        channels = config.block_out_channels
        self.controlnet_cond_embedding = ConditioningEmbedding(config.conditioning_channels, config.conditioning_embedding_out_channels, config.width)
        # One for the first convolution, and one for each layer that the way up will see
        widths = [config.width]
        for width, block in zip(channels, self.down_blocks):
            widths += [width] * (len(block.resnets) + len(block.downsamplers or ()))
        self.controlnet_down_blocks = nn.ModuleList(zeroed(nn.Conv2d(width, width, 1)) for width in widths)
        self.controlnet_mid_block = zeroed(nn.Conv2d(channels[-1], channels[-1], 1))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, encoder_hidden_states: torch.Tensor | None, controlnet_cond: torch.Tensor,
                conditioning_scale: float = 1.0, class_labels: torch.Tensor | None = None,
                added_cond_kwargs: Mapping[str, torch.Tensor] | None = None) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What is added inside the U-Net that predicts from the same ``sample``.

        Args:
            sample: [B, in_channels, H, W], any size.
            timestep: [B], or one for all.
            encoder_hidden_states: [B, L, cross_attention_dim] text states; None where no block attends to text.
            controlnet_cond: [B or 1, conditioning_channels, f H, f W] the control picture; f: ``config.downscale_factor``.
            conditioning_scale: factor of all that is returned.
            class_labels, added_cond_kwargs: as the U-Net takes them.

        Returns: (one for each skip of the U-Net, its ``down_block_additional_residuals``; that of the middle, its ``mid_block_additional_residual``).
            With ``global_pool_conditions`` each is [B, C, 1, 1].
        Raises: ValueError naming the argument that is missing or whose shape or device does not fit, TypeError whose dtype does not.
        """
        added = dict(added_cond_kwargs or {})
        self.check(sample, encoder_hidden_states, class_labels, added, present(controlnet_cond=controlnet_cond), {})
        self._check_picture(sample, controlnet_cond)
        if self.config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = controlnet_cond.flip(1)
        temb = self.conditioning(sample, timestep, None, class_labels, added)
        text = Text(encoder_hidden_states)
        x, skips = self.way_down(self.conv_in(sample) + self.controlnet_cond_embedding(controlnet_cond), temb, text)
        x = self.mid_block(x, temb, text)

        residuals = [block(skip) for block, skip in zip(self.controlnet_down_blocks, skips)] + [self.controlnet_mid_block(x)]
        residuals = [residual * conditioning_scale for residual in residuals]
        if self.config.global_pool_conditions:
            residuals = [residual.mean(dim=(2, 3), keepdim=True) for residual in residuals]
        return residuals[:-1], residuals[-1]

    def _check_picture(self, sample: torch.Tensor, picture: torch.Tensor | None) -> None:
        factor, channels = self.config.downscale_factor, self.config.conditioning_channels
        batch, height, width = sample.shape[0], factor * sample.shape[2], factor * sample.shape[3]
        if picture is None or picture.shape[1:] != (channels, height, width) or picture.shape[0] not in (1, batch):
            raise ValueError(f"controlnet_cond is {None if picture is None else list(picture.shape)}; it should be [{batch}, {channels}, {height}, {width}], "
                             f"{factor} pixels along one of the latents")


def from_official(state_dict: Mapping[str, torch.Tensor], config: ControlNetConfig) -> dict[str, torch.Tensor]:
    """The state dict of lllyasviel's ``ControlNet`` under our (diffusers') names.

    A ``control_model.`` prefix is dropped, and with it whatever in a full checkpoint is not the ControlNet. Raises KeyError for a name that the config
    does not lead to.
    """
    top = dict(ENCODER_TOP, **{"middle_block_out.0": "controlnet_mid_block", "input_hint_block.0": "controlnet_cond_embedding.conv_in"})
    blocks = 2 * (len(config.conditioning_embedding_out_channels) - 1)
    top |= {f"input_hint_block.{2 * index + 2}": f"controlnet_cond_embedding.blocks.{index}" for index in range(blocks)}
    top[f"input_hint_block.{2 * blocks + 2}"] = "controlnet_cond_embedding.conv_out"
    layers = list(encoder_layers(config))
    count = 1 + len({name.rpartition(".")[0] for name, _, _ in layers if name.startswith("input_blocks")})
    top |= {f"zero_convs.{index}.0": f"controlnet_down_blocks.{index}" for index in range(count)}
    return renamed(state_dict, "control_model.", top, layers, config)
