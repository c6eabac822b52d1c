"""The two things that a user can get wrong with every command: the input, and asking for work where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import torch


class BadInput(ValueError):
    """An argument, folder or file cannot be used. The message is one line that names it, says what it is and what it should be."""


class NothingToDo(ValueError):
    """The input is fine, but holds nothing that Fusewire could work on."""


def count(name: str, value) -> None:
    """``value`` is a whole number of at least 1."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise BadInput(f"{name} is {value!r}; it should be a whole number of at least 1")


@contextmanager
def blaming(name: str, taker: str) -> Iterator[None]:
    """An error of a call that the argument ``name`` was made for is said to be that argument's, unless memory ran out."""
    try:
        yield
    except (BadInput, NothingToDo, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        said = lines[-1].lstrip("} ") if lines[0].endswith("{") else lines[0]  # behind a configuration that was printed whole
        raise BadInput(f"{name} does not fit {taker}, whose call said: {type(error).__name__}: {said}") from error
