"""Which backend runs an op: decided before launch, from declared limits.

An op owns a table of rows (name, predicate, function). The predicate takes the op's arguments and returns ``""`` where the row can serve the
call, otherwise the reason why not. The first row that can serve runs; nothing is tried and caught.
``FUSEWIRE_BACKEND=reference|triton|cuda|cpu`` forces one row, and a call it cannot serve is an error.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from fusewire.errors import BadInput
from fusewire.kernels.library import CPU, variant
from fusewire.kernels.transforms import written_by

NAMES = ("cpu", "cuda", "triton", "reference")


class Backend(NamedTuple):
    """One row: ``why_not(*args) -> str`` (empty: can serve) and ``run(*args)``."""

    name: str
    why_not: Callable[..., str]
    run: Callable


def recording() -> bool:
    """Whether what is called may be recorded: by autograd, torch.compile, a dispatch mode or torch.func."""
    return bool(torch.is_grad_enabled() or is_compiling() or torch._C._len_torch_dispatch_stack() or transformed())


def transformed() -> bool:
    """Whether a transform of torch.func, or forward mode, is at work: it differentiates without a graph, and so also where gradients are off."""
    return not is_compiling() and (_transforms_active() or forward_ad._current_level >= 0)


_is_grad_enabled, _is_inference, _any_requires_grad = torch.is_grad_enabled, torch.is_inference_mode_enabled, torch._C._any_requires_grad
_get_tracing_state = torch._C._get_tracing_state
_transforms_active, _BelowAutograd = torch._C._are_functorch_transforms_active, torch._C._AutoDispatchBelowAutograd
_BelowVersions = torch._C._AutoDispatchBelowADInplaceOrView


def unrecorded(op: torch._ops.OpOverload) -> Callable:
    """``op``, past its autograd formula where there is nothing to record, as under ``torch.no_grad()``: the formula is Python, which takes 6 us to find
    that out by the same questions. (In inference mode it is not reached.) The same of an op that changes arguments, whose version counters a kernel in
    Python moves. All else that sees calls of ops sees this one."""
    call, written = op._op, written_by(op)

    def run(*args):
        if is_compiling() or _get_tracing_state() is not None:  # torch.jit.trace compares graphs, which name the lines that called their ops
            return op(*args)
        if _is_inference() or forward_ad._current_level >= 0 or _is_grad_enabled() and (_any_requires_grad(*args) or _transforms_active()):
            return call(*args)
        with _BelowAutograd():
            return call(*args)

    def change(*args):
        if is_compiling():
            return op(*args)
        if _is_inference() or _transforms_active() or _is_grad_enabled() and _any_requires_grad(*args):
            return call(*args)
        increment_version([args[i] for i in written])
        with _BelowVersions():
            return call(*args)

    return change if written else run


LAUNCHERS: dict[torch._ops.OpOverload, Callable] = {}  # a registered op of a row -> what it calls, counted as the table would


def launched(name: str, op: torch._ops.OpOverload, why_not: Callable[..., str], launch: Callable) -> Backend:
    """The row ``name`` of ``op``, where kernels are launched from Python: ``launch`` takes the op's arguments.

    Where a graph is recorded (autograd, torch.compile, a dispatch mode, torch.func) the call is the registered op ``<op>_<name>``; ``launch`` alone
    serves the rest, at less overhead. An op that changes its arguments is always called as an op, so that their version counters move.
    """
    registered = variant(op, name, launch)
    LAUNCHERS[registered] = _counted(op._schema.name.split("::")[1], name, launch)
    if op._schema.is_mutable:
        return Backend(name, why_not, registered)

    def run(*args):
        return registered(*args) if recording() else launch(*args)

    return Backend(name, why_not, run)


def _counted(op: str, name: str, launch: Callable) -> Callable:
    def call(*args):
        TABLES[op].calls[name] += 1
        return launch(*args)

    return call


class Choice(NamedTuple):
    """One backend's part in a call: whether it would run, and ``""`` or the reason why it would not."""

    backend: str
    runs: bool
    reason: str


class BackendError(RuntimeError):
    """A forced backend cannot serve this call."""


def _forced_by_environment() -> str | None:
    name = os.environ.get("FUSEWIRE_BACKEND") or None
    if name is not None and name not in NAMES:
        raise BadInput(f"FUSEWIRE_BACKEND is {name!r}; it should be one of {', '.join(NAMES)}")
    return name


_forced: str | None = _forced_by_environment()
_asking = 0  # threads inside ``choices``: a plain number, which costs a call nothing to read
_ASKING, _THIS_THREAD = threading.Lock(), threading.local()
TABLES: dict[str, "Table"] = {}


class Table:
    """The backends of one op, in order of preference, with a count of the calls that each served.

    A ``cpu`` row calls ``fusewire::<op>`` of the compiled library. Where that library is older and has no such kernel, the row stands down.
    """

    def __init__(self, op: str, rows: list[Backend]):
        self.op, self.rows = op, [_unless_stale(op, row) for row in rows]
        self.calls = {row.name: 0 for row in rows}
        TABLES[op] = self

    @property
    def rows(self) -> list[Backend]:
        return self._rows

    @rows.setter
    def rows(self, rows: list[Backend]) -> None:
        self._rows = rows
        # torch.compile traces the op itself
        self._direct = [(row.why_not, unrecorded(row.run) if isinstance(row.run, torch._ops.OpOverload) else row.run, row.name, row.run) for row in rows]
        self._sure = rows[0].name == "cpu" and CPU.loaded and not CPU.why_not(self.op)

    def __call__(self, *args):
        if _asking and _is_question():
            raise _Reached(self, args)
        if _forced is not None:
            return self._run_forced(args)
        for why_not, direct, name, run in self._direct:
            if not why_not(*args):
                if is_compiling():
                    return run(*args)
                self.calls[name] += 1
                return direct(*args)
        raise BackendError(f"{self.op}: no backend can serve this call")

    def by_cpu(self, *args):
        """A call that the CPU row, the first, is known to serve from the checks that the op made: served without asking it again, 0.3 us."""
        if _forced is not None or _asking or not self._sure or is_compiling():
            return self(*args)
        self.calls["cpu"] += 1
        return self._direct[0][1](*args)

    def _run_forced(self, args):
        for row in self.rows:
            if row.name == _forced:
                reason = row.why_not(*args)
                if reason:
                    raise BackendError(f"{self.op}: the forced backend {_forced!r} cannot serve this call: {reason}")
                if not is_compiling():
                    self.calls[row.name] += 1
                return row.run(*args)
        raise BackendError(f"{self.op} has no backend {_forced!r}; it has {', '.join(row.name for row in self.rows)}")

    def choices(self, *args) -> list[Choice]:
        """What each row would do with this call, in order of preference."""
        found, taken = [], False
        for row in self.rows:
            reason = row.why_not(*args)
            if not reason and _forced is not None and row.name != _forced:
                reason = f"the backend is forced to {_forced!r}"
            elif not reason and taken:
                reason = "a backend that is preferred serves the call"
            taken = taken or not reason
            found.append(Choice(row.name, not reason, reason))
        return found


class LeftToReference:
    """Calls of a table's op that plain PyTorch alone serves, by ``run``, whatever their arguments: counted there, and refused by any other backend that is
    forced, for ``reason``."""

    def __init__(self, table: Table, reason: str, run: Callable):
        self.table, self.reason, self.run = table, reason, run

    def __call__(self, *args):
        if _asking and _is_question():
            raise _Reached(self, args)
        if _forced not in (None, "reference"):
            raise BackendError(f"{self.table.op}: the forced backend {_forced!r} cannot serve this call: {self.reason}")
        if not is_compiling():
            self.table.calls["reference"] += 1
        return self.run(*args)

    def choices(self, *args) -> list[Choice]:
        forced_away = f"the backend is forced to {_forced!r}" if _forced not in (None, "reference") else ""
        return [Choice(row.name, not forced_away, forced_away) if row.name == "reference" else Choice(row.name, False, self.reason) for row in self.table.rows]


class _Reached(Exception):
    """How a question ends: the table (or what is left to the reference of one) that the call came to, and the arguments that its rows get."""


def _ask(begins: bool) -> None:
    """Calls of this thread, and of no other, are questions from now on, or no longer."""
    global _asking
    with _ASKING:
        _asking += 1 if begins else -1
    _THIS_THREAD.asks = begins


def _is_question() -> bool:
    return getattr(_THIS_THREAD, "asks", False)


def choices(call: Callable, *args, **kwargs) -> list[Choice]:
    """What each backend would do with ``call(*args, **kwargs)``, a public op: its checks run, no kernel does.

    RuntimeError where the op returns without having come to a table: a fault of the op, whose calls would neither be counted nor obey a forced backend.
    """
    _ask(True)
    try:
        call(*args, **kwargs)
    except _Reached as reached:
        table, given = reached.args
    else:
        raise RuntimeError(f"{call.__name__} returned without choosing a backend: nothing is known of its calls")
    finally:
        _ask(False)
    return table.choices(*given)


def _unless_stale(op: str, row: Backend) -> Backend:
    reason = CPU.why_not(op) if row.name == "cpu" else ""
    return row._replace(why_not=lambda *args: reason) if reason else row


def always(*args) -> str:
    """The predicate of the reference row."""
    return ""


def forced_backend() -> str | None:
    """The backend that ``FUSEWIRE_BACKEND`` or ``forced`` names, or None."""
    return _forced


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Force one backend for the calls inside, in every thread of the process (None: none). Raises ``BackendError`` at a call it cannot serve."""
    global _forced
    if name is not None and name not in NAMES:
        raise ValueError(f"name is {name!r}; it should be one of {', '.join(NAMES)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def stats() -> dict[str, dict[str, int]]:
    """Calls served since the start, ``{op: {backend: count}}``. Calls inside compiled graphs are counted once, at tracing, as none."""
    return {op: dict(table.calls) for op, table in sorted(TABLES.items())}


def reset_stats() -> None:
    """Set every count to zero."""
    for table in TABLES.values():
        table.calls = dict.fromkeys(table.calls, 0)
