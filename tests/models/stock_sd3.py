"""Tiny stock SD3 transformers with random weights in every parameter, and their inputs."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models import normalization
from torch import nn

SD3 = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
           joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16)
SD35 = dict(SD3, qk_norm="rms_norm", dual_attention_layers=(0,), num_layers=3)
VARIANTS = {"sd3": SD3, "sd3.5": SD35}


def randomise(model: nn.Module) -> nn.Module:
    """Every parameter random, so that no bias and no gain is invisible."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{name}".rsplit(".", 2)[-2].startswith("norm_"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.15)
    return model


def stock_model(variant: str, dtype: torch.dtype = torch.float32, **changes) -> SD3Transformer2DModel:
    return randomise(SD3Transformer2DModel(**dict(VARIANTS[variant], **changes))).eval().to(dtype)


def inputs(batch: int = 2, height: int = 8, width: int = 12, tokens: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of a tiny transformer; not square, so that rows and columns cannot be exchanged unnoticed."""
    return dict(hidden_states=torch.randn(batch, 4, height, width).to(dtype), encoder_hidden_states=torch.randn(batch, tokens, 32).to(dtype),
                pooled_projections=torch.randn(batch, 64).to(dtype), timestep=torch.rand(batch) * 1000)


class Waves64(nn.Module):
    """diffusers' timestep sinusoids without their float32 casts."""

    def __init__(self, channels: int = 256, shift: float = 0, cosines_first: bool = True):
        super().__init__()
        self.half, self.shift, self.cosines_first = channels // 2, shift, cosines_first

    def forward(self, timestep):
        steps = torch.arange(self.half, dtype=torch.float64) / (self.half - self.shift)
        frequency = torch.exp(-torch.log(torch.tensor(10000.0, dtype=torch.float64)) * steps)
        angle = timestep.double()[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()] if self.cosines_first else [angle.sin(), angle.cos()], dim=1)


class RMSNorm64(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def in_float64(model: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """The stock model in float64, with its two hard-coded float32 computations (sinusoids, RMS norm) done in float64 as well."""
    model = model.double()
    model.time_text_embed.time_proj = Waves64()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is normalization.RMSNorm:
                setattr(module, name, RMSNorm64(child))
    return model
