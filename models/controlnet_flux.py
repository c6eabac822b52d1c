"""The ControlNets of FLUX.1: a Flux's first blocks that see a control picture, and give what is added behind the Flux's own.

Zhang, Rao and Agrawala (2023), "Adding Conditional Control to Text-to-Image Diffusion Models", on the blocks of Black Forest Labs (2024). Attribute names
and state-dict keys are those of diffusers' ``FluxControlNetModel``, in the forms that were published: InstantX's and Shakker Labs', which see the picture's
latents, also the union of several kinds, each with a token of its own before the text; and XLabs', which see the picture's pixels (``from_official`` maps
the names of their repository). What joins the Flux begins at zero: trained from ``load_state_dict(flux.state_dict(), strict=False)``, it begins by changing nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fusewire.models.controlnet import ConditioningEmbedding
from fusewire.models.flux import OFFICIAL_INPUTS, FluxConfig, FluxTrunk, renamed, rope_tables
from fusewire.models.inputs import present
from fusewire.models.layers import linear, zeroed
from fusewire.models.patches import patchify

WIDTHS = (16, 16, 16, 16)  # of the features of pixels, each but the first at half the size of the one before
PIXELS = 2 ** (len(WIDTHS) - 1)  # of the control picture along one of its features


@dataclass(frozen=True)
class FluxControlNetConfig(FluxConfig):
    """Field names and defaults of diffusers' ``FluxControlNetModel`` config, plus ``mlp_ratio`` and the transformer's ``out_channels``, without effect.

    ``num_mode``: kinds of control of a union. ``conditioning_embedding_channels``: of the pixels' features, of which ``patch_size`` by ``patch_size``
    are a token.
    """

    stock = "FluxControlNetModel"

    num_mode: int | None = None
    conditioning_embedding_channels: int | None = None

    def __post_init__(self):
        super().__post_init__()
        features = self.conditioning_embedding_channels
        if features is not None and features * self.patch_size**2 != self.in_channels:
            raise ValueError(f"conditioning_embedding_channels is {features}; {self.patch_size} x {self.patch_size} of them, by patch_size, "
                             f"should be in_channels = {self.in_channels}")


class FluxControlNet(FluxTrunk):
    """diffusers' ``FluxControlNetModel``. ``numerics`` as in ``fusewire.swap``."""

    def __init__(self, config: FluxControlNetConfig, numerics: str = "close"):
        super().__init__(config, numerics)
        channels, features = config.inner_dim, config.conditioning_embedding_channels
        self.controlnet_blocks = nn.ModuleList(zeroed(nn.Linear(channels, channels)) for _ in range(config.num_layers))
        self.controlnet_single_blocks = nn.ModuleList(zeroed(nn.Linear(channels, channels)) for _ in range(config.num_single_layers))
        if config.num_mode is not None:
            self.controlnet_mode_embedder = nn.Embedding(config.num_mode, channels)
        self.input_hint_block = None if features is None else ConditioningEmbedding(3, WIDTHS, features)
        self.controlnet_x_embedder = nn.Linear(config.in_channels, channels)
        if features is None:
            zeroed(self.controlnet_x_embedder)

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, pooled_projections: torch.Tensor, timestep: torch.Tensor,
                img_ids: torch.Tensor, txt_ids: torch.Tensor, controlnet_cond: torch.Tensor, guidance: torch.Tensor | None = None,
                controlnet_mode: torch.Tensor | None = None,
                conditioning_scale: float = 1.0) -> tuple[list[torch.Tensor] | None, list[torch.Tensor] | None]:
        """What is added inside the Flux that predicts from the same ``hidden_states``.

        Args:
            hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance: as the Flux takes them.
            controlnet_cond: [B or 1, T, in_channels] the control picture's packed latents; with ``conditioning_embedding_channels`` [B or 1, 3, H, W] its
                pixels, 8 ``patch_size`` along each side of a token.
            controlnet_mode: [B, 1] integers, the kind of control, of a model with ``num_mode``.
            conditioning_scale: factor of all that is returned.

        Returns: (one [B, T, C] for each block of two streams, the Flux's ``controlnet_block_samples``; the same of one stream, its
            ``controlnet_single_block_samples``); None where there are no such blocks.
        Raises: ValueError naming the argument that is missing or whose shape or device does not fit, or ``guidance`` or ``controlnet_mode`` where the
            model wants it or not; TypeError naming one whose dtype does not fit.
        """
        self.check(hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance,
                   present(controlnet_cond=controlnet_cond), present(controlnet_mode=controlnet_mode))
        self._check_control(hidden_states, controlnet_cond, controlnet_mode)
        if self.input_hint_block is not None:
            controlnet_cond = patchify(self.input_hint_block(controlnet_cond), self.config.patch_size)
        x = linear(self.x_embedder, hidden_states, self.how)
        x = x + linear(self.controlnet_x_embedder, controlnet_cond, self.how)
        temb = self.conditioning(timestep, pooled_projections, guidance, x.dtype)
        context = linear(self.context_embedder, encoder_hidden_states, self.how)
        if controlnet_mode is not None:
            context, txt_ids = torch.cat([self.controlnet_mode_embedder(controlnet_mode), context], dim=1), torch.cat([txt_ids[:1], txt_ids])
        rope = rope_tables(torch.cat([txt_ids, img_ids]), self.config.axes_dims_rope)
        found = []
        for blocks, outlets in ((self.transformer_blocks, self.controlnet_blocks), (self.single_transformer_blocks, self.controlnet_single_blocks)):
            residuals = []
            for block, outlet in zip(blocks, outlets):
                context, x = block(x, context, temb, rope)
                residuals.append(linear(outlet, x, self.how) * conditioning_scale)
            found.append(residuals or None)
        return found[0], found[1]

    def _check_control(self, x: torch.Tensor, picture: torch.Tensor | None, mode: torch.Tensor | None) -> None:
        batch, tokens, config = x.shape[0], x.shape[1], self.config
        shape = [0] if picture is None else list(picture.shape)
        if config.conditioning_embedding_channels is None:
            fits, wanted = shape[1:] == [tokens, config.in_channels], f"[{batch}, {tokens}, {config.in_channels}]"
        else:
            side = PIXELS * config.patch_size
            fits = len(shape) == 4 and shape[1] == 3 and not shape[2] % side and not shape[3] % side and shape[2] * shape[3] == tokens * side**2
            wanted = f"[{batch}, 3, H, W], {tokens} squares of {side} x {side} pixels"
        if not fits or shape[0] not in (1, batch):
            raise ValueError(f"controlnet_cond is {None if picture is None else shape}; it should be {wanted}")
        if (mode is not None) != (config.num_mode is not None) or mode is not None and mode.shape != (batch, 1):
            raise ValueError(f"controlnet_mode is {None if mode is None else list(mode.shape)}; "
                             f"it should be {None if config.num_mode is None else [batch, 1]}, as num_mode is {config.num_mode}")


_HINT = ("conv_in", *(f"blocks.{index}" for index in range(2 * (len(WIDTHS) - 1))), "conv_out")  # every other layer of theirs is a SiLU
_OFFICIAL_TOP = OFFICIAL_INPUTS | {"pos_embed_input": "controlnet_x_embedder",
                                   **{f"input_hint_block.{2 * index}": f"input_hint_block.{name}" for index, name in enumerate(_HINT)}}


def from_official(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of XLabs' ``ControlNetFlux`` under our (diffusers') names.

    For a config with ``num_single_layers=0``, ``patch_size=2`` and ``conditioning_embedding_channels=16``. Packed projections are split into views.
    Raises KeyError for a name that ControlNetFlux does not have.
    """
    outlets = {stem: stem for stem in (key.rpartition(".")[0] for key in state_dict) if re.fullmatch(r"controlnet_blocks\.\d+", stem)}
    return renamed(state_dict, _OFFICIAL_TOP | outlets, "ControlNetFlux")
