"""Where the latents that a step returns lie in memory: in ``exact`` as those that it was given, which is where stock's sums lie.

An autoencoder may give img2img and inpainting channels-last latents, and a convolution of such rounds otherwise; the kernels' results are contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fusewire.models.layers import How


def laid_out(maker: Callable[[How], dict]) -> Callable[[How], dict]:
    """``maker`` of a scheduler's fused class, with a step that minds the layout."""

    def make(how: How) -> dict:
        namespace = maker(how)
        return namespace | {"step": _in_layout(namespace["step"])} if how.numerics == "exact" else namespace

    return make


def _in_layout(step: Callable) -> Callable:
    @functools.wraps(step)
    def minding(self, model_output, timestep, sample, *args, **kwargs):
        found = step(self, model_output, timestep, sample, *args, **kwargs)
        if not isinstance(sample, torch.Tensor) or sample.is_contiguous():
            return found
        if isinstance(found, tuple):
            return tuple(_as(sample, one) for one in found)
        for name in list(found.keys()):
            found[name] = _as(sample, found[name])
        return found

    return minding


def _as(sample: torch.Tensor, one):
    if not isinstance(one, torch.Tensor) or one.shape != sample.shape:
        return one
    like = torch.empty_like(sample, dtype=one.dtype)
    return one if one.stride() == like.stride() else like.copy_(one)
