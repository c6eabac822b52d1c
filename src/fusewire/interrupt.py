"""Ctrl-C that loses nothing: a KeyboardInterrupt goes on to the caller, and carries what was finished as its ``result``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def keeping(result) -> Iterator[None]:
    """A KeyboardInterrupt inside takes ``result`` along, marked as ``interrupted``; or None, while ``result`` has no complete row."""
    try:
        yield
    except KeyboardInterrupt as stop:
        result.interrupted = True
        stop.result = result if result.rows else None
        raise


def finished(call: Callable):
    """What ``call`` returns, or what an interrupt brought along from it. An interrupt that brought nothing goes on."""
    try:
        return call()
    except KeyboardInterrupt as stop:
        if getattr(stop, "result", None) is None:
            raise
        return stop.result


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C does nothing inside: people press it twice, and the second one would cut short the writing of what is finished."""
    if threading.current_thread() is not threading.main_thread():  # no other may set a handler, and none is interrupted
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
