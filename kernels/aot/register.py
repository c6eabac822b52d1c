"""The registry of the launches that are compiled: on meta tensors, for a size and a dtype each."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

SHORT = {torch.bfloat16: "bf16", torch.float32: "f32", torch.float16: "f16"}
TWO = (torch.bfloat16, torch.float32)  # float16 differs from bfloat16 in one conversion instruction


class Swept(NamedTuple):
    """A case's launcher at any size: a width, channels or a head dimension, up to ``most`` where ``serves`` holds."""

    run: Callable[[int, torch.dtype], None]
    most: int
    serves: Callable[[int], bool]


CASES: dict[str, Callable[[], None]] = {}
SWEPT: dict[tuple[str, torch.dtype], Swept] = {}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases(name: str, sizes: Iterable[int] = (0,), dtypes: tuple[torch.dtype, ...] = TWO, most: int = 0, serves: Callable[[int], bool] = lambda size: True):
    """A case for each size and dtype, called ``name`` with both in its places. ``most``: the largest size that is served, where the size may choose a tile."""
    def add(run: Callable[[int, torch.dtype], None]):
        for size, dtype in itertools.product(sizes, dtypes):
            CASES[name.format(size, SHORT[dtype])] = functools.partial(run, size, dtype)
        if most:
            SWEPT.update({(name, dtype): Swept(run, most, serves) for dtype in dtypes})
        return run
    return add


def tokens(channels: int, dtype, length: int = 1024, batch: int = 2):
    """x, the nine chunks of one modulation tensor, and a weight."""
    return meta(batch, length, channels, dtype=dtype), meta(batch, 9 * channels, dtype=dtype).chunk(9, -1), meta(channels, dtype=dtype)
