"""The two things that a user can get wrong with every command: the input, and asking for work where there is none."""

from __future__ import annotations


class BadInput(ValueError):
    """An argument, folder or file cannot be used. The message is one line that names it, says what it is and what it should be."""


class NothingToDo(ValueError):
    """The input is fine, but holds nothing that Fusewire could work on."""
