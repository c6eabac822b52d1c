"""What a swap did: which modules run which fused op, and which were left alone, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Entry(NamedTuple):
    """One module and one op. ``reason`` is empty where it was swapped; ``by_choice``: left because of ``numerics`` or ``only``."""

    name: str
    op: str
    reason: str = ""
    by_choice: bool = False


@dataclass
class Report:
    """``swapped`` and ``left``: lists of entries with ``.name``, ``.op`` and ``.reason``."""

    numerics: str
    swapped: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"numerics={self.numerics!r}: {len(self.swapped)} swapped, {len(self.left)} left"]
        for title, entries in (("swapped", self.swapped), ("left", self.left)):
            groups: dict[tuple[str, str], list[str]] = {}
            for entry in entries:
                groups.setdefault((entry.op, entry.reason), []).append(entry.name)
            for (op, reason), names in groups.items():
                where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
                lines.append(f"  {title}  {op}: {where}" + (f" ({reason})" if reason else ""))
        return "\n".join(lines)


class SwapError(RuntimeError):
    """Strict mode: something that could carry an op would have been left alone."""


class SwapWarning(UserWarning):
    """Something that could carry an op was left alone; given once per op and reason."""
