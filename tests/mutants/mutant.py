"""What a mutant is: one textual edit of a room's source, which the room's tests should notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """``old``, which occurs once in ``file``, becomes ``new``; ``tests``, of the room's folder, in turn, should fail.

    ``equivalent``: why no test can, where that is so. A mutant of csrc needs a library of its own (``--native``).
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    @property
    def native(self) -> bool:
        return self.file.startswith("csrc/")


def of_room(room: str):
    """``mutant(what, file, old, new, *tests)`` for files of ``kernels/<room>``; a file with a folder is named from the repository's root."""
    def mutant(what: str, file: str, old: str, new: str, *tests: str, equivalent: str = "") -> Mutant:
        return Mutant(what, file if "/" in file else f"kernels/{room}/{file}", old, new, tests, equivalent)
    return mutant
