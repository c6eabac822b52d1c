"""Progress bars on the terminal's error stream, so that standard output stays what was asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def bars(title: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """A function ``tell(what, done, total)`` that keeps one bar for each ``what``. Silent where the error stream is no terminal."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, int] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(f"{title}: {what}" if title else what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield tell
