"""What a swap did: which modules run which fused op, and which were left alone, with the reason."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

SIDES = ("swapped", "left", "noted")


class Entry(NamedTuple):
    """One module and one op. ``reason``: why it was left, or what it was before where it was swapped already; ``by_choice``: left because of ``numerics``
    or ``only``."""

    name: str
    op: str
    reason: str = ""
    by_choice: bool = False


@dataclass
class Report:
    """``swapped`` and ``left``: lists of entries with ``.name``, ``.op`` and ``.reason``. ``noted``: what else was found, such as a compiled module."""

    numerics: str
    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    noted: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"numerics={self.numerics!r}: {len(self.swapped)} swapped, {len(self.left)} left"]
        for title in SIDES:
            groups: dict[tuple[str, str], list[str]] = {}
            for entry in getattr(self, title):
                groups.setdefault((entry.op, entry.reason), []).append(entry.name)
            for (op, reason), names in groups.items():
                where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
                lines.append(f"  {title}  {op}: {where}" + (f" ({reason})" if reason else ""))
        return "\n".join(lines)


class SwapError(RuntimeError):
    """Strict mode: something that could carry an op would have been left alone."""


class SwapWarning(UserWarning):
    """Something that could carry an op was left alone; given once per op and reason."""


def warn_the_user(message: str) -> None:
    """A ``SwapWarning`` at the line outside Fusewire from which it was called, however deep: also where ``with swapped(...)`` is entered."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusewire", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SwapWarning, stacklevel=level)
