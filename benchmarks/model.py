"""One call of a preset's model on the CPU: stock diffusers, torch.compile, Fusewire and OpenVINO, alternating in one process, random weights.

    python benchmarks/model.py --preset flux-dev --dtype bfloat16 --rounds 5 --json benchmarks/results/flux-dev-bfloat16.json

The presets are those of ``fusewire profile``: full width, some of the blocks (``--layers``), one picture (``--size`` pixels), or ``--batch`` of them.
"""

from __future__ import annotations

import argparse

import torch

import sides as of
from alternating import main
from fusewire.presets import PRESETS, build, inputs_for


def rows(arguments: argparse.Namespace):
    dtype = getattr(torch, arguments.dtype)

    def make():
        return build(arguments.preset, dtype, arguments.layers, arguments.size, 0)[0]

    model, _, _, size = build(arguments.preset, dtype, arguments.layers, arguments.size, 0)
    example = inputs_for(model, size=size, text_tokens=PRESETS[arguments.preset].text_tokens, batch=arguments.batch)
    del model
    example.pop("return_dict")
    yield from of.measured(of.sides(arguments.sides, make, example, dtype), arguments)


def options(parser: argparse.ArgumentParser) -> None:
    of.options(parser)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch", type=int, default=1)


if __name__ == "__main__":
    main(__doc__, rows, rounds=5, options=options)
