"""Tiny models: a second thread costs more than it brings."""

from tests.one_thread import one_thread  # noqa: F401
