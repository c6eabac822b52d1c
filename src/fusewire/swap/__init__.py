"""Putting fused forwards into somebody else's modules, and taking them out again.

``swap`` changes instances only: a module's ``__class__`` becomes a subclass of its own class with the same name, whose forward is ours. No class,
module or default of another library is changed, no state-dict key moves, and ``restore`` gives back the very same classes.
``fusewire.swap`` is this package, and calling it runs ``swap``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fusewire.callable_package import calls

if TYPE_CHECKING:
    from fusewire.swap.engine import Handle


def swap(pipe_or_module, numerics: str = "exact", only: str | Iterable[str] | None = None, strict: bool = False) -> Handle:
    """Put Fusewire's forwards into a diffusers pipeline, a model or a scheduler, instance by instance.

    Args:
        pipe_or_module: a ``DiffusionPipeline``, a ``torch.nn.Module`` or a scheduler.
        numerics: ``"exact"``: every output stays ``torch.equal`` to stock's. ``"close"``: also what cannot be bit-equal (attention, other matrix
            products), with an error against float64 at most twice that of stock.
        only: names of ops to swap, as the report gives them (``"adaln_modulate"``, ``"attention"``, ...), or None for all.
        strict: raise where something that could carry one of these ops is left alone for another reason than ``numerics`` or ``only``.

    Returns: a handle with ``.report`` (what was swapped, what was left and why) and ``.restore()``.
    Raises: TypeError for a ``pipe_or_module`` of another kind; BadInput (a ValueError) for an unknown ``numerics`` or ``only`` and for a half-loaded
        model; NothingToDo (a ValueError) where there is nothing to swap; SwapError in strict mode. Then nothing has been changed.
    """
    from fusewire.swap import engine

    return engine.swap(pipe_or_module, numerics, only, strict)


def restore(pipe_or_module) -> int:
    """Give every swapped part of a pipeline or module its stock class back, whoever swapped it; returns how many there were.

    Works on copies and unpickled models too. Raises TypeError for an object of another kind.
    """
    from fusewire.swap import engine

    return engine.restore(pipe_or_module)


@contextmanager
def swapped(pipe_or_module, numerics: str = "exact", only: str | Iterable[str] | None = None, strict: bool = False) -> Iterator[Handle]:
    """``swap`` for the length of a ``with`` block; on leaving it, everything is as it was on entering."""
    handle = swap(pipe_or_module, numerics, only, strict)
    try:
        yield handle
    finally:
        handle.restore()


calls(__name__, swap)
