"""What is measured: op -> cases on the shapes of real models, each with the bytes that it cannot avoid moving."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """``shape`` of the op's main input; ``elements`` read and written at least, counted in the dtype of the case."""

    what: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    elements: int


def _qk(what: str, *shape: int) -> Case:
    return Case(what, shape, ("float32", "bfloat16"), 4 * shape[0] * shape[1] * shape[2] * shape[3])  # q and k in, q and k out


def _latents(what: str, *shape: int) -> Case:
    count = 1
    for size in shape:
        count *= size
    return Case(what, shape, ("float32", "bfloat16"), 4 * count)  # sample, two predictions, result


REGISTRY = {
    "qk_norm_rope": [
        _qk("SD3.5-medium 512^2, guidance", 2, 1024, 24, 64),
        _qk("SD3.5-medium 512^2", 1, 1024, 24, 64),
        _qk("Flux 512^2, rotated", 1, 1024, 24, 128),
    ],
    "sampler_step": [
        _latents("SD3.5 1024^2, two pictures", 2, 16, 128, 128),
        _latents("Flux 1024^2, packed", 1, 4096, 64),
        _latents("SD1.5 512^2", 1, 4, 64, 64),
    ],
}
