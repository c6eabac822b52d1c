"""Ctrl-C that is not lost.

A KeyboardInterrupt is raised wherever Python happens to be. Inside another library's bare ``except``, or a callback from C, it is swallowed
and the work goes on. So it is remembered, and raised again at the next step of whatever reports its progress.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_asked = False


@contextmanager
def remembered() -> Iterator[None]:
    """Inside, ``check`` knows of every SIGINT. Only the main thread can arrange that; elsewhere nothing changes."""
    global _asked
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handle(number, frame):
        global _asked
        _asked = True
        signal.default_int_handler(number, frame)

    _asked = False
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        _asked = False
        signal.signal(signal.SIGINT, signal.default_int_handler)


def check() -> None:
    """Raise the KeyboardInterrupt that was swallowed, if one was."""
    if _asked:
        raise KeyboardInterrupt
