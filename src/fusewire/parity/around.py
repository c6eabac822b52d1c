"""The parts around a pipeline's denoiser: what it calls once or seldom, each judged as a whole like the denoiser itself.

Text encoders, ControlNets and the like on what the stock pipeline gave them; the two halves of an autoencoder on a small picture of random numbers, as
whole pictures in float64 would take more memory than the denoiser does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fusewire.copies import detached, place_of, tensors_in
from fusewire.parity.blocks import judge_model
from fusewire.parity.result import Row

SIDE = 16  # latents


@dataclass(frozen=True)
class Part:
    """A module of a pipeline by its dotted name, and one call of it."""

    name: str
    args: tuple
    kwargs: dict

    @property
    def is_half(self) -> bool:
        """Of an autoencoder, which no run for latents calls."""
        return "." in self.name

    def of(self, pipe) -> nn.Module:
        component, _, rest = self.name.partition(".")
        return getattr(pipe, component).get_submodule(rest)


def _components(pipe, swaps: Mapping[str, dict], denoiser: str) -> dict[str, nn.Module]:
    """Those that hold something swapped, the denoiser apart."""
    touched = {entry["name"].partition(".")[0] for report in swaps.values() for entry in report["swapped"]}
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module) and name in touched - {denoiser}}


def _is_autoencoder(part: nn.Module) -> bool:
    """Whether both halves take one tensor: diffusers' ``AutoencoderKL``. Those of others have conditions of their own."""
    return type(part).__name__ == "AutoencoderKL"


@contextmanager
def watching(pipe, swaps: Mapping[str, dict], denoiser: str) -> Iterator[list[Part]]:
    """The parts of the stock ``pipe`` that have something swapped in one of ``swaps``; filled on leaving, with the first call of each made inside.

    Half an autoencoder whose numbers are too large for float16, which its pipeline casts to float32 for each picture, is left out.
    """
    found: list[Part] = []
    calls: dict[str, Part] = {}

    def keep(name: str):
        def hook(_, args, kwargs):
            calls.setdefault(name, Part(name, detached(args), detached(kwargs)))
        return hook

    components = _components(pipe, swaps, denoiser)
    handles = [part.register_forward_pre_hook(keep(name), with_kwargs=True) for name, part in components.items() if not _is_autoencoder(part)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name, part in components.items():
        found += _halves(pipe, name, part) if _is_autoencoder(part) else [calls[name]] if name in calls else []


def _halves(pipe, name: str, part: nn.Module) -> list[Part]:
    device, dtype = place_of(part)
    pixels = SIDE * 2 ** (len(part.config.block_out_channels) - 1)
    numbers = torch.Generator().manual_seed(0)
    latents = torch.randn(1, part.config.latent_channels, SIDE, SIDE, generator=numbers)
    picture = torch.randn(1, part.config.in_channels, pixels, pixels, generator=numbers).clamp(-1, 1)
    halves = [Part(f"{name}.{half}", (given.to(device, dtype),), {}) for half, given in (("decoder", latents), ("encoder", picture))]
    return [half for half in halves if all(t.isfinite().all() for t in tensors_in(call(pipe, half)))]


@torch.inference_mode()
def call(pipe, part: Part):
    """The part's call, in ``pipe``."""
    return part.of(pipe)(*detached(part.args), **detached(part.kwargs))


def judge_parts(parts: list[Part], stock, swapped: Mapping[str, object], swaps: Mapping[str, dict], tick: Callable[[], None]) -> Iterator[Row]:
    """One row for each part and numerics that has something swapped in it."""
    for part in parts:
        models = {numerics: part.of(pipe) for numerics, pipe in swapped.items()
                  if any(entry["name"].startswith(f"{part.name}.") for entry in swaps[numerics]["swapped"])}
        yield from judge_model(part.of(stock), models, part.args, part.kwargs, tick, f"{part.name} ({type(part.of(stock)).__name__})")
