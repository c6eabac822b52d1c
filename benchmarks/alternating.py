"""Timing in turn: every function once per round, in one process, so that all meet the same machine."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fusewire.kernels.library import cpu_isa


def measure(functions: dict[str, Callable], rounds: int, inner: int = 1) -> dict[str, float]:
    """Median microseconds of each function over ``rounds`` rounds of ``inner`` calls, after three warm rounds."""
    times = {name: [] for name in functions}
    for i in range(rounds + 3):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(inner):
                function()
            if i >= 3:
                times[name].append((time.perf_counter() - start) / inner * 1e6)
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def processor() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else "unknown"


def main(description: str, rows: Callable[[int], Iterable[dict]]) -> None:
    """The command line of a benchmark: ``[--rounds N] [--json FILE]``; ``rows(rounds)`` yields one dictionary per measurement."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = []
    with torch.inference_mode():
        for row in rows(arguments.rounds):
            found.append(row)
            print(row, flush=True)
    if arguments.json:
        command = f"python benchmarks/{Path(sys.argv[0]).name} --rounds {arguments.rounds}"
        machine = {"processor": processor(), "isa": cpu_isa(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        Path(arguments.json).write_text(json.dumps({"command": command, "machine": machine, "unit": "microseconds", "rows": found}, indent=1) + "\n")
