"""One call of a preset's model on the CPU: stock diffusers, torch.compile, Fusewire and OpenVINO, alternating in one process, random weights.

    python benchmarks/model.py --preset flux-dev --dtype bfloat16 --rounds 5 --json benchmarks/results/flux-dev-bfloat16.json

The presets are those of ``fusewire profile``: full width, some of the blocks (``--layers``), one picture (``--size`` pixels), or ``--batch`` of them. An
autoencoder encodes and decodes it; with ``--decode`` it decodes alone.
"""

from __future__ import annotations

import argparse

import torch

import sides as of
from alternating import main
from fusewire.presets import PRESETS, VAE_FACTOR, build, inputs_for


class Decoder(torch.nn.Module):
    """Latents [B, C, H / 8, W / 8] -> pictures."""

    def __init__(self, autoencoder: torch.nn.Module):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latents: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return self.autoencoder.decode(latents, return_dict=return_dict)


def rows(arguments: argparse.Namespace):
    dtype = getattr(torch, arguments.dtype)

    def make():
        model = build(arguments.preset, dtype, arguments.layers, arguments.size, 0)[0]
        return Decoder(model).eval() if arguments.decode else model

    model, _, _, size = build(arguments.preset, dtype, arguments.layers, arguments.size, 0)
    example = inputs_for(model, size=size, text_tokens=PRESETS[arguments.preset].text_tokens, batch=arguments.batch)
    example.pop("return_dict")
    if arguments.decode:
        side = size // VAE_FACTOR
        example = dict(latents=torch.randn(arguments.batch, model.config.latent_channels, side, side).to(dtype))
    del model
    yield from of.measured(of.sides(arguments.sides, make, example, dtype), arguments)


def options(parser: argparse.ArgumentParser) -> None:
    of.options(parser)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--decode", action="store_true", help="of an autoencoder: decode latents")


if __name__ == "__main__":
    main(__doc__, rows, rounds=5, options=options)
