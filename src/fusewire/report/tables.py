"""Tables for the terminal."""

from __future__ import annotations

import sys
from collections import Counter

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from fusewire.parity.result import LEVELS, ParityResult
from fusewire.parity.result import Row as ParityRow
from fusewire.profile.result import MemoryRow, ProfileResult
from fusewire.swap.report import SIDES


# What a terminal that is too narrow does without, the first first; and columns of words that are not folded.
SPARE = ("", "quartiles us", "quartiles ms", "clone us", "calls", "backend", "fused calls", "mean error", "PSNR dB", "mismatch", "first call ms", "peak MiB",
         "without weights", "scratch", "kept", "dtype", "x clone", "shape", "tested with", "for example", "level", "tensors", "weights")
WHOLE = ("verdict", "numerics", "backend", "level", "dtype", "side")


def fitted(table: Table, console: Console) -> tuple:
    """The table without the columns that a narrow terminal would have to cut numbers for, and a line that names them."""
    if not isinstance(table, Table):
        return (table,)
    for column in table.columns:
        column.no_wrap = column.no_wrap or column.justify == "right" or column.header in WHOLE
        column.overflow = "fold"  # rather than cut
    lacking = []
    for name in SPARE:
        if sum(_least(column, console) + 3 for column in table.columns) < console.width:
            break
        for column in [column for column in table.columns if column.header == name and (name or column.no_wrap)]:  # (those of bars have no name)
            place = table.columns.index(column)
            end = place + 2 if [beside.header for beside in table.columns[place + 1:place + 2]] == ["stock's"] else place + 1
            del table.columns[place:end]
            lacking.append(name)
    lacking = list(dict.fromkeys(filter(None, lacking)))
    note = f"(without {', '.join(lacking)}, for which the terminal is too narrow; --json has all)" if lacking else ""
    return (table, Text(note, style="dim")) if note else (table,)


def _least(column: Column, console: Console) -> int:
    """The width that a column should have: of its longest cell, or of 14 letters where words may be folded."""
    longest = max(Measurement.get(console, console.options.update(width=1000), cell).maximum for cell in (column.header, *column.cells))
    return longest if column.no_wrap else min(longest, 14)


def verdict(holds: bool) -> Text:
    """``holds`` or ``FAILS``, in words as well as in colour."""
    return Text("holds", style="green") if holds else Text("FAILS", style="bold red")


def figure(value: float | None, form: str = ".2e") -> str:
    """A number in a cell; empty for None, ``0`` for exactly zero, ``inf`` in full."""
    if value is None:
        return ""
    return "0" if value == 0 else format(value, form)


def decibel(value: float | None) -> str:
    """``equal`` for an infinite ratio."""
    return "" if value is None else "equal" if value == float("inf") else f"{value:.1f}"


def percent(value: float | None) -> str:
    """A share as a percentage, with enough digits to tell little from nothing."""
    if value is None:
        return ""
    return "0 %" if value == 0 else f"{100 * value:.3g} %"


def parity_table(result: ParityResult, *, full: bool = True) -> Table:
    """Every row of a parity result; or, with ``full=False``, each level and numerics in one line that shows its worst row."""
    table = Table(title=escape(f"Parity: {result.target}, {result.dtype}"), title_justify="left", caption="errors against float64, absolute; "
                  "mismatch: elements that differ from stock's", caption_justify="left")
    for name, justify in (("level", "left"), ("what", "left"), ("numerics", "left"), ("backend", "left"), ("max error", "right"),
                          ("stock's", "right"), ("mean error", "right"), ("stock's", "right"), ("mismatch", "right"), ("PSNR dB", "right"),
                          ("verdict", "left")):
        table.add_column(name, justify=justify)
    rows = result.rows if full else summary(result.rows)
    for before, row in zip([None, *rows], rows):
        if before is not None and before.level != row.level:
            table.add_section()
        table.add_row(row.level, escape(row.name), row.numerics, row.backend, figure(row.max_error), figure(row.stock_max_error),
                      figure(row.mean_error), figure(row.stock_mean_error), percent(row.mismatch), decibel(row.psnr), verdict(row.holds))
    return table


def badness(row: ParityRow) -> tuple:
    """The key by which the worst of several rows is the largest."""
    ratio = row.max_error / row.stock_max_error if row.max_error and row.stock_max_error else 0.0
    return (not row.holds, -(row.psnr if row.psnr is not None else 0.0), ratio, row.mismatch or 0.0)


def summary(rows: list[ParityRow]) -> list[ParityRow]:
    """The worst row of each level and numerics, named with the number of rows that it stands for."""
    from dataclasses import replace

    worst = []
    for level in LEVELS:
        for numerics in ("exact", "close"):
            group = [row for row in rows if row.level == level and row.numerics == numerics]
            if group:
                row = max(group, key=badness)
                backends = ", ".join(dict.fromkeys(name for r in group for name in r.backend.split(", ") if name and name != "none"))
                held = sum(r.holds for r in group)
                worst.append(replace(row, name=f"{held} of {len(group)} hold; worst: {row.name}" if len(group) > 1 else row.name,
                                     backend=backends))
    return worst


NAMES = {"eager": "stock, eager", "compile": "stock, torch.compile", "exact": "swapped, exact", "close": "swapped, close"}


def profile_table(result: ProfileResult) -> Table:
    """Every side of a profile, with the floor as its last line."""
    table = Table(title=escape(f"Throughput: {result.target}, {result.dtype}"), title_justify="left", caption=machine_line(result.machine),
                  caption_justify="left")
    compiled = result.row("compile") is not None
    columns = ["side", "median ms", "quartiles ms", "x eager", *(["x compile"] if compiled else []), "first call ms", "peak MiB", "fused calls"]
    for name in columns:
        table.add_column(name, justify="left" if name in ("side", "fused calls") else "right")
    for row in result.rows:
        cells = [NAMES[row.variant], f"{row.median_ms:.1f}", f"{row.low_ms:.1f} - {row.high_ms:.1f}", f"{row.against_eager:.2f}"]
        cells += [f"{row.against_compile:.2f}"] if compiled else []
        table.add_row(*cells, f"{row.first_ms:.0f}", "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
                      ", ".join(f"{backend} {n}" for backend, n in row.backends.items()))
    floor = result.floor
    if floor:
        table.add_section()
        table.add_row("floor", f"{floor['roofline_ms']:.1f}", "", *([""] if compiled else []), "", "", "",
                      f"{floor['gflop']:.1f} GFLOP at {floor['gemm_gflops']:.0f} GFLOP/s, {floor['bandwidth_gbs']:.1f} GB/s")
    return table


def memory_table(result: ProfileResult) -> Table:
    """Peak memory of every side, held against stock's."""
    table = Table(title="Peak memory, MiB", title_justify="left", caption="tensors: the most that one call needs at once; scratch: of the CPU library's threads; "
                  "kept: what the swap leaves behind, such as rearranged weights", caption_justify="left")
    for name in ("side", *MEMORY, "verdict"):
        table.add_column(name, justify="left" if name in ("side", "verdict") else "right")
    for row in result.memory:
        table.add_row(NAMES[row.variant], *memory_cells(row), "" if row.limit is None else verdict(row.holds))
    return table


MEMORY = ("weights", "tensors", "scratch", "kept", "peak", "x stock", "without weights", "limit")


def memory_cells(row: MemoryRow) -> list[str]:
    """The figures of one side, in the order of ``MEMORY``."""
    return [f"{row.weights_mib:.1f}", f"{row.tensors_mib:.2f}", f"{row.scratch_mib:.2f}", f"{row.kept_mib:.2f}", f"{row.peak_mib:.1f}", f"{row.against_eager:.3f}",
            f"{row.working_against_eager:.3f}", "" if row.limit is None else f"{row.limit:.2f}"]


def kinds_table(result: ProfileResult) -> Table:
    """Milliseconds of each kind of operation and of each stage, side by side for every variant, with bars."""
    table = Table(title="Where the time goes, ms", title_justify="left")
    table.add_column("kind or stage")
    variants, bar = list(result.kinds), "█" if "utf" in (getattr(sys.stdout, "encoding", None) or "").lower() else "#"
    for variant in variants:
        table.add_column(NAMES[variant], justify="right")
        table.add_column("", no_wrap=True)
    for part in (result.kinds, {v: result.stages[v] for v in variants if v in result.stages}):
        if not part:
            continue
        longest = max((value for spent in part.values() for value in spent.values()), default=0.0) or 1.0
        table.add_section()
        for name in part[variants[0]]:
            cells = []
            for variant in variants:
                value = part[variant][name]
                cells += [f"{value:.1f}", bar * round(12 * value / longest)]
            table.add_row(name, *cells)
    return table


def verdict_table(result: ProfileResult) -> Table:
    """The verdicts of a profile."""
    table = Table(title="Verdicts", title_justify="left")
    for name in ("what has to hold", "verdict", "detail"):
        table.add_column(name)
    for row in result.verdicts:
        table.add_row(escape(row.name), verdict(row.holds), escape(row.detail))
    return table


def swap_table(swaps: dict[str, dict], target: str) -> Table:
    """What was swapped and what was left, grouped by op and reason."""
    table = Table(title=escape(f"Swap report: {target}"), title_justify="left")
    for name, justify in (("numerics", "left"), ("", "left"), ("op", "left"), ("modules", "right"), ("for example", "left"), ("reason", "left")):
        table.add_column(name, justify=justify)
    for numerics, report in swaps.items():
        table.add_section()
        for side, op, reason, count, example in grouped(report):
            table.add_row(numerics, Text(side, style="green" if side == "swapped" else "yellow"), op, str(count), escape(example), escape(reason))
    return table


def grouped(report: dict) -> list[tuple[str, str, str, int, str]]:
    """[(side, op, reason, number of modules, the first one's name)] of a swap report."""
    found = []
    for side in SIDES:
        counts = Counter((entry["op"], entry["reason"]) for entry in report.get(side, ()))
        for (op, reason), count in counts.items():
            example = next(entry["name"] for entry in report[side] if (entry["op"], entry["reason"]) == (op, reason))
            found.append((side, op, reason, count, example))
    return found


def machine_line(machine: dict) -> str:
    """Processor, threads, versions, in one line."""
    isa = f", library at {machine['fusewire_isa']}" if machine["fusewire_isa"] else ""
    return (f"{machine['processor']} ({machine['isa']}{isa}), {machine['threads']} threads, torch {machine['versions'].get('torch', '?')}, "
            f"load {machine['load']} when it ended")


def bench_table(result) -> Table:
    """Every op on every backend that can serve it (``fusewire.profile.bench.BenchResult``)."""
    table = Table(title=escape(f"Ops of {result.target}"), title_justify="left", caption=machine_line(result.machine), caption_justify="left")
    for name in ("op", "shape", "dtype", "numerics", "backend"):
        table.add_column(name)
    for name in ("calls", "median us", "quartiles us", "eager us", "clone us", "x eager", "x clone"):
        table.add_column(name, justify="right")
    table.add_column("parity")
    for row in result.rows:
        table.add_row(row.op, row.shape, row.dtype, row.numerics, row.backend, str(row.calls), f"{row.median_us:.0f}",
                      f"{row.low_us:.0f} - {row.high_us:.0f}", f"{row.eager_us:.0f}", f"{row.clone_us:.0f}",
                      "" if row.against_eager is None else f"{row.against_eager:.2f}", f"{row.against_clone:.2f}", verdict(row.holds))
    return table


def doctor_tables(found) -> tuple[Table, Table]:
    """Backends, and packages with their tested versions (``fusewire.doctor.Diagnosis``)."""
    machine = found.machine
    backends = Table(title=f"Backends: {machine['processor']}, {machine['threads']} threads, {machine['system']}, Python {machine['python']}",
                     title_justify="left")
    for name in ("backend", "", "ops", "here", "what would help"):
        backends.add_column(name)
    for row in found.backends:
        backends.add_row(row.backend, Text("ready", style="green") if row.ready else Text("no", style="yellow"), row.ops, row.state, row.fix)
    packages = Table(title="Packages", title_justify="left")
    for name in ("package", "installed", "asked for", "tested with", "remark"):
        packages.add_column(name)
    for row in found.packages:
        packages.add_row(row.name, row.installed or Text("none", style="yellow"), row.wanted or "any", row.tested, row.remark)
    return backends, packages
