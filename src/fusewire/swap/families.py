"""The model families that can be swapped, one file each. A family file names its candidates; nothing else knows its classes."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

from fusewire.models.layers import How
from fusewire.swap.report import warn_the_user

MODULES = ("fusewire.swap.sd3", "fusewire.swap.flux", "fusewire.swap.unet", "fusewire.swap.text_encoders", "fusewire.swap.scheduler")
OLDEST_DIFFUSERS = (0, 40)


class Candidate(NamedTuple):
    """What one instance could carry: the ``ops`` that ``fused``, the class to give it, would run. Where ``fused`` is None it stays, for ``reason``;
    ``by_choice``: because of ``numerics``."""

    name: str
    instance: object
    ops: tuple[str, ...]
    fused: type | None
    reason: str = ""
    by_choice: bool = False


class Family(NamedTuple):
    """``candidates(name, instance, how)`` yields what an instance of a tree (a module, a scheduler) and its direct parts can carry."""

    name: str
    ops: tuple[str, ...]
    candidates: Callable[[str, object, How], Iterator[Candidate]]


@lru_cache(maxsize=None)
def load() -> tuple[tuple[Family, ...], str]:
    """(the families that this environment has, why there are not more)."""
    if importlib.util.find_spec("diffusers") is None:
        return (), "diffusers is not installed"
    import diffusers

    if tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < OLDEST_DIFFUSERS:
        return (), f"diffusers {diffusers.__version__} is older than {'.'.join(map(str, OLDEST_DIFFUSERS))}"
    found, missing = [], []
    for module in MODULES:
        try:
            found.append(importlib.import_module(module).FAMILY)
        except ImportError as error:  # a library that has moved or renamed a class: this family stays stock
            missing.append(f"{module}: {error}")
            if error.name != "transformers":  # without it there are no text encoders either
                warn_the_user(f"{module.rpartition('.')[2]} stay stock: {error}")
    return tuple(found), "; ".join(missing)
