"""Op by op: the calls that a swapped model makes are recorded with their arguments, then judged one at a time.

Stock's side is the op's reference with ``exact`` rounding, which rounds where the eager modules round; the truth is the reference with
``close`` rounding on float64 arguments, where nothing rounds to less. What the reference itself is worth shows one level up, where whole blocks are compared with diffusers' own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fusewire.copies import tensors_in
from fusewire.kernels.dispatch import TABLES, Backend, Table
from fusewire.parity.result import Row, name_of
from fusewire.parity.twin import widen
from fusewire.parity.verdict import measure


@dataclass
class Call:
    """One distinct call of an op: the backend that ran, its arguments as they were, and how often it came."""

    op: str
    backend: Backend
    args: tuple
    count: int = 1


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Record every distinct call (op, backend, shapes, strides, dtypes, other arguments) made inside, with its first arguments."""
    calls: dict[tuple, Call] = {}
    before = {op: table.rows for op, table in TABLES.items()}
    for op, table in TABLES.items():
        table.rows = [_recorded(op, row, calls) for row in table.rows]
    found: list[Call] = []
    try:
        yield found
    finally:
        for op, rows in before.items():
            TABLES[op].rows = rows
        found.extend(calls.values())


def _recorded(op: str, row: Backend, calls: dict[tuple, Call]) -> Backend:
    def run(*args):
        key = (op, row.name, *map(_signature, args))
        if key in calls:
            calls[key].count += 1
        else:
            calls[key] = Call(op, row, tuple(_kept(arg) for arg in args))
        return row.run(*args)

    return row._replace(run=run)


def _signature(arg) -> str:
    if isinstance(arg, torch.Tensor):
        return f"{arg.dtype} {tuple(arg.shape)} {arg.stride()}"
    if isinstance(arg, (tuple, list)):
        return f"[{', '.join(map(_signature, arg))}]"
    return repr(arg)


def _kept(arg):
    """A copy of an argument in the same memory layout. Weights are kept as they are: nothing writes to them."""
    if isinstance(arg, nn.Parameter):
        return arg.detach()
    if isinstance(arg, torch.Tensor):
        return copy_in_layout(arg.detach())
    if isinstance(arg, (tuple, list)):
        return type(arg)(_kept(part) for part in arg)
    return arg


def copy_in_layout(x: torch.Tensor) -> torch.Tensor:
    """A copy of ``x`` with its shape and strides, expanded dimensions (stride 0) included."""
    once = x
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            once = once.narrow(dim, 0, 1)
    extent = 1 + sum((n - 1) * s for n, s in zip(once.shape, once.stride())) if once.numel() else 0
    storage = torch.zeros(extent, dtype=x.dtype, device=x.device)
    return storage.as_strided(once.shape, once.stride()).copy_(once).expand(x.shape)


def reference_of(op: str):
    """The reference row's function of an op's table, or None where it has none."""
    table: Table = TABLES[op]
    return next((row.run for row in table.rows if row.name == "reference"), None)


def with_rounding(op: str, args: tuple, exact: bool) -> tuple:
    """The arguments with the op's ``exact`` set; unchanged for an op that has only one way to round."""
    names = list(inspect.signature(reference_of(op)).parameters)
    if "exact" not in names:
        return args
    at = names.index("exact")
    return (*args[:at], exact, *args[at + 1:])


def asks_exact(op: str, args: tuple) -> bool:
    """Whether a call asked to be torch.equal to stock."""
    names = list(inspect.signature(reference_of(op)).parameters)
    return "exact" in names and bool(args[names.index("exact")])


def outputs(op: str, run, args: tuple) -> list[torch.Tensor]:
    """The tensors that a call returns, then those that its schema says it writes. ``args`` stay as they are."""
    schema = getattr(torch.ops.fusewire, op).default._schema
    args = tuple(copy_in_layout(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
    written = [arg for arg, known in zip(args, schema.arguments) if known.alias_info is not None and known.alias_info.is_write]
    return tensors_in(run(*args)) + written


def judge(calls: list[Call], numerics: str, tick=lambda: None) -> Iterator[Row]:
    """One row per recorded call, each as soon as it is complete."""
    for call in calls:
        reference = reference_of(call.op)
        if reference is not None:
            exact = asks_exact(call.op, call.args)
            with torch.inference_mode():
                got = outputs(call.op, call.backend.run, call.args)
                stock = outputs(call.op, reference, with_rounding(call.op, call.args, True))
                true = outputs(call.op, reference, with_rounding(call.op, widen(call.args), False))
            found = measure(got, stock, true, exact)
            first = next(t for t in call.args if isinstance(t, torch.Tensor))
            yield Row("op", call.op if call.count == 1 else f"{call.op} ({call.count} calls)", numerics, name_of(first.dtype), call.backend.name,
                      "x".join(map(str, first.shape)), "exact" if exact else "close", found.holds, found.equal, found.reason, found.max_error,
                      found.mean_error, found.stock_max_error, found.stock_mean_error, found.max_difference, found.mean_difference, found.mismatch)
        tick()

