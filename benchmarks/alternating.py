"""How the benchmarks measure and record: every function once per round, in one process, so that all meet the same machine.

A benchmark has a function ``rows(arguments)`` that yields one dictionary per measurement, and ends in ``main(__doc__, rows)``. What ``--json``
writes names the command, the day, the machine and the versions, and is the same for every benchmark.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fusewire import keep_memory, ops
from fusewire.machine import describe, version_of

ROOT = Path(__file__).resolve().parents[1]
# What lowers the instructions that oneDNN and Fusewire use: part of the command, as the result depends on them.
ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "FUSEWIRE_CPU_ISA")
WARM_ROUNDS = 3


def samples(functions: dict[str, Callable], rounds: int, inner: int = 1, warm: int = WARM_ROUNDS) -> dict[str, list[float]]:
    """Microseconds per call of each function, one figure for each of ``rounds`` rounds of ``inner`` calls, after ``warm`` rounds that do not count.
    Each round goes through them in an order of its own: what a function finds in the caches is what the one before it left there."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions.items()), random.Random(0).shuffle
    for i in range(rounds + warm):
        shuffle(order)
        for name, function in order:
            start = time.perf_counter()
            for _ in range(inner):
                function()
            if i >= warm:
                times[name].append((time.perf_counter() - start) / inner * 1e6)
    return times


def measure(functions: dict[str, Callable], rounds: int, inner: int = 1, warm: int = WARM_ROUNDS) -> dict[str, float]:
    """The medians of ``samples``."""
    return {name: round(statistics.median(times), 2) for name, times in samples(functions, rounds, inner, warm).items()}


def served(op: str) -> str:
    """The backend that served every call of ``op`` since ``ops.reset_stats()``; an error where it was more than one: the row would mix them."""
    backends = [backend for backend, calls in ops.stats()[op].items() if calls]
    if len(backends) != 1:
        raise RuntimeError(f"{op} was served by {' and '.join(backends) or 'no backend'}; a row should be about one backend")
    return backends[0]


def machine() -> dict:
    """``fusewire.machine.describe()``, and what tells processors of one name apart."""
    found = describe()
    info = Path("/proc/cpuinfo")
    named = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.is_file() else {}
    named = {name.strip(): value.strip() for name, value in named.items()}
    if "model" in named:
        found["processor"] += f" (family {named.get('cpu family')}, model {named['model']})"
    if version_of("openvino"):
        found["versions"]["openvino"] = version_of("openvino")
    return found


def command() -> str:
    """The command as it was typed, with the paths that lie in the checkout seen from its root and no others."""
    def shown(word: str) -> str:
        path = Path(word)
        if not path.is_absolute():
            return word
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    lowered = [f"{name}={os.environ[name]}" for name in ISA_VARIABLES if name in os.environ]
    return shlex.join([*lowered, "python", f"benchmarks/{Path(sys.argv[0]).name}", *map(shown, sys.argv[1:])])


def write(path: Path, rows: list[dict], state: dict, unit: str = "microseconds") -> None:
    """``state``: ``machine()`` as it was before the first measurement, so that its load is not the benchmark's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": command(), "date": datetime.date.today().isoformat(), "machine": state, "unit": unit, "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(doc: str, rows: Callable[[argparse.Namespace], Iterable[dict]], *, rounds: int = 21,
         options: Callable[[argparse.ArgumentParser], None] = lambda parser: None) -> None:
    """The command line of a benchmark: ``[--rounds N] [--json FILE] [--fresh-memory]`` and its own ``options``. Rows are printed as they come.

    Freed memory is kept (``fusewire.keep_memory``): otherwise a large output costs page faults, or not, depending on what the side before it freed.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--fresh-memory", action="store_true", help="leave freed memory to the C library, which hands it back to the system")
    options(parser)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    state, found = machine() | {"freed memory is kept": not arguments.fresh_memory and keep_memory()}, []
    with torch.inference_mode():
        for row in rows(arguments):
            found.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items() if not isinstance(value, (list, dict))), flush=True)
    if arguments.json:
        write(arguments.json, found, state)
