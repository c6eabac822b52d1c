"""The SD3.5-medium shape on the CPU: stock diffusers, torch.compile, Fusewire and OpenVINO, alternating in one process.

``SD3Transformer2DModel`` with 3 of SD3.5-medium's 24 blocks (2 with the second attention), 1024 image and 154 text tokens, width 1536,
24 heads of 64, batch 1, random weights. Every side gets the same inputs; one call of each side in turn, medians. Prints a table and writes JSON:

    python benchmarks/sd3_block.py --dtype bfloat16 --rounds 7 --json benchmarks/results/sd3_block-bfloat16.json

OpenVINO is a rival only where it is installed (``pip install openvino``); it runs the module converted by ``openvino.convert_model``.
"""

from __future__ import annotations

import argparse

import torch

from alternating import main
from sides import measured, options, sides

CONFIG = dict(sample_size=128, patch_size=2, in_channels=16, num_layers=3, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
              caption_projection_dim=1536, pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=384, dual_attention_layers=(0, 1),
              qk_norm="rms_norm")


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One picture of 64 x 64 latents: 1024 tokens, and 154 tokens of text."""
    generator = torch.Generator().manual_seed(1)
    shapes = dict(hidden_states=(1, 16, 64, 64), encoder_hidden_states=(1, 154, 4096), pooled_projections=(1, 2048))
    named = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return named | dict(timestep=torch.tensor([500.0]).to(dtype))


def stock(dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(**CONFIG).eval().to(dtype)


def rows(arguments: argparse.Namespace):
    dtype = getattr(torch, arguments.dtype)
    yield from measured(sides(arguments.sides, lambda: stock(dtype), inputs(dtype), dtype), arguments)


if __name__ == "__main__":
    main(__doc__, rows, rounds=7, options=options)
