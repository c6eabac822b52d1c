"""Packages that can be called: ``fusewire.parity`` is both the package of that name and the function that users call.

Importing ``fusewire.parity.verdict`` binds the package as ``fusewire.parity``, which would hide a function of the same name.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable


class CallableModule(types.ModuleType):
    """A module whose call is the function that ``calls`` gave it."""

    def __call__(self, *args, **kwargs):
        return self.__wrapped__(*args, **kwargs)


def calls(module: str, function: Callable) -> None:
    """Make calling the module named ``module`` call ``function``, with its signature shown by ``help`` and ``inspect``."""
    found = sys.modules[module]
    found.__class__ = CallableModule
    found.__wrapped__ = function
