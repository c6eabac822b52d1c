"""Tiny stock Flux transformers with random weights in every parameter, and their inputs."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from tests.models.stock_sd3 import Waves64, randomise

SCHNELL = dict(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
               pooled_projection_dim=24, axes_dims_rope=(4, 4, 8), guidance_embeds=False)
DEV = dict(SCHNELL, guidance_embeds=True)
FILL = dict(DEV, in_channels=24, out_channels=16)
VARIANTS = {"schnell": SCHNELL, "dev": DEV, "fill": FILL}


def stock_model(variant: str, dtype: torch.dtype = torch.float32, **changes) -> FluxTransformer2DModel:
    return randomise(FluxTransformer2DModel(**dict(VARIANTS[variant], **changes))).eval().to(dtype)


def positions(rows: int, columns: int, first: int = 0) -> torch.Tensor:
    """[rows * columns, 3]: the pipeline's ids; ``first``: 0 for the picture, 1 for the reference picture of Kontext."""
    grid = torch.zeros(rows, columns, 3)
    grid[..., 0] = first
    grid[..., 1] += torch.arange(rows)[:, None]
    grid[..., 2] += torch.arange(columns)[None, :]
    return grid.view(-1, 3)


def inputs(variant: str = "dev", batch: int = 2, rows: int = 3, columns: int = 5, tokens: int = 7, dtype: torch.dtype = torch.float32) -> dict:
    config = VARIANTS[variant]
    given = dict(hidden_states=torch.randn(batch, rows * columns, config["in_channels"]).to(dtype),
                 encoder_hidden_states=torch.randn(batch, tokens, 32).to(dtype), pooled_projections=torch.randn(batch, 24).to(dtype),
                 timestep=torch.rand(batch), img_ids=positions(rows, columns), txt_ids=torch.zeros(tokens, 3))
    return dict(given, guidance=torch.full((batch,), 3.5)) if config["guidance_embeds"] else given


class Rotation64(nn.Module):
    """diffusers' tables of angles, in float64."""

    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, ids):
        angles = [torch.outer(ids[:, i].double(), 1 / 10000 ** (torch.arange(0, dim, 2).double() / dim)) for i, dim in enumerate(self.dims)]
        angle = torch.cat(angles, 1).repeat_interleave(2, 1)
        return angle.cos(), angle.sin()


def in_float64(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The stock model in float64, its sinusoids too. Its rotation stays in float32, as ``apply_rotary_emb`` casts."""
    model = model.double()
    model.time_text_embed.time_proj = Waves64()
    return model
