"""The page docs/kernels-compiled.md: what the newest supported Triton makes of each case, and where the oldest differs."""

from __future__ import annotations

from collections.abc import Iterable

from fusewire.kernels.aot.limits import ATOMICS, NARROW, WAIVERS, faults
from fusewire.kernels.aot.report import TARGETS, Compiled

HELPERS = ("column_sums_kernel", "pattern_tiles_kernel")  # of many cases: equal rows once
MATRIX = ("mma", "mfma")


def _version(triton: str) -> tuple[int, ...]:
    return tuple(int(part) for part in triton.split(".") if part.isdigit())


def _cell(values: Iterable) -> str:
    values = [str(value) for value in values]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def _widths(found: dict[str, int]) -> str:
    return ", ".join(f"{count} x {size}" for size, count in sorted(found.items(), key=lambda item: -int(item[0]))) or "-"


def _matrix(one: Compiled) -> str:
    return ", ".join(f"{count} {name}" for name, count in one.instructions.items() if any(kind in name for kind in MATRIX))


def _row(ones: list[Compiled]) -> str:
    """A kernel of a case on its targets."""
    cells = ([one.warps for one in ones], [one.stages for one in ones], [one.registers for one in ones], [one.spills for one in ones],
             [f"{one.shared / 1024:.3g}" for one in ones], [_widths(one.loads) for one in ones], [_widths(one.stores) for one in ones], map(_matrix, ones))
    return f"| {ones[0].kernel} | " + " | ".join(map(_cell, cells)) + " |"


def _kernels(reports: list[Compiled]) -> dict[tuple, list[Compiled]]:
    """By case, kernel and how many of this kernel the case launched before: one for each target."""
    found: dict[tuple, list[Compiled]] = {}
    counts: dict[tuple, int] = {}
    for one in reports:
        key = one.case, one.target, one.kernel
        counts[key] = counts.get(key, -1) + 1
        found.setdefault((one.case, one.kernel, counts[key]), []).append(one)
    return found


def _differences(new: Compiled, old: Compiled) -> list[str]:
    found = []
    if new.spills != old.spills:
        found.append(f"{old.spills} bytes spilled, not {new.spills}")
    if abs(new.registers - old.registers) > 0.1 * new.registers:
        found.append(f"{old.registers} registers, not {new.registers}")
    if new.shared != old.shared:
        found.append(f"{old.shared / 1024:.3g} KiB shared, not {new.shared / 1024:.3g}")
    for what, now, before in (("loads", new.loads, old.loads), ("stores", new.stores, old.stores)):
        if now.keys() != before.keys():
            found.append(f"{what} {_widths(before)}, not {_widths(now)}")
    return found


def _summary(versions: dict[str, list[Compiled]]) -> list[str]:
    rows = [("kernels compiled, of a case on a target", lambda ones: len(ones)),
            ("which spill, all of them waived", lambda ones: sum(one.spills > 0 for one in ones)),
            ("the same, where rows are aligned", lambda ones: sum(one.spills > 0 and one.aligned for one in ones)),
            ("with a fault", lambda ones: sum(bool(faults(one)) for one in ones)),
            ("with atomics", lambda ones: sum(any(name in one.instructions for name in ATOMICS) for one in ones))]
    rows += [(f"most shared memory on {target}, KiB (limit {arch.shared // 1024})",
              lambda ones, target=target: f"{max((one.shared for one in ones if one.target == target), default=0) / 1024:.4g}") for target, arch in TARGETS.items()]
    return [f"| | {' | '.join(f'Triton {version}' for version in versions)} |", "|---" * (len(versions) + 1) + "|",
            *(f"| {name} | {' | '.join(str(count(ones)) for ones in versions.values())} |" for name, count in rows)]


def _waivers(versions: dict[str, list[Compiled]]) -> list[str]:
    lines = ["| cases | on | at most | " + " | ".join(f"by Triton {version}" for version in versions) + " | why |", "|---" * (len(versions) + 4) + "|"]
    for waiver in WAIVERS:
        needed = [[one.spills for one in ones if one.spills and waiver.holds(one)] for ones in versions.values()]
        cells = " | ".join(f"{len(spills)} kernels, {min(spills)} to {max(spills)} bytes" if spills else "none" for spills in needed)
        cases = waiver.cases.replace("|", "\\|")
        lines.append(f"| `{cases}` | {', '.join(waiver.targets) or 'all'} | {waiver.most} | {cells} | {waiver.why} |")
    return lines


def page(reports: list[Compiled]) -> list[str]:
    """Its lines, for reports of one or more versions of Triton."""
    versions = {version: [one for one in reports if one.triton == version] for version in sorted({one.triton for one in reports}, key=_version, reverse=True)}
    newest, *older = versions
    lines = [
        "# What the Triton kernels compile to", "",
        f"Made by `make kernels-compiled` with Triton {newest}" + "".join(f" and, the oldest that is supported, {version}" for version in older)
        + f", for {', '.join(TARGETS)}; no GPU was used. The cases are launches of the rooms' own launchers, on shapes of real models and, for each tile "
        "that a launcher may choose, on one that chooses it. Every offset has 64 bits.", "",
        *_summary(versions), "",
        "## Waived spills", "", "A waiver that nothing needs, or that allows more than there is, is a fault.", "", *_waivers(versions), "",
        "## Narrow accesses", "",
        "Where rows are aligned each kernel reads 16 bytes at a time; on NVIDIA's targets, what it reads or writes besides in narrower accesses is by nature:", "",
        "| kernel | loads | stores | why |", "|---|---|---|---|",
        *(f"| {kernel} | {', '.join(map(str, sorted(loads)))} | {', '.join(map(str, sorted(stores)))} | {why} |" for kernel, (loads, stores, why) in NARROW.items()), "",
        f"## Triton {newest}", "",
        f"Figures are for {' / '.join(TARGETS)}, one where they agree. Registers and spilled bytes: from the machine code. Loads and stores: instructions by width "
        "in bytes, asynchronous copies included, TMA's not. Shared memory in KiB.", ""]
    shown: set[str] = set()
    op = ""
    for (case, kernel, _), ones in _kernels(versions[newest]).items():
        row = _row(ones)
        if case.startswith("layout of") or kernel in HELPERS and row in shown:
            continue
        shown.add(row)
        if case.split()[0] != op:
            op = case.split()[0]
            lines += [*([""] if lines[-1] else []), f"### {op}", "",
                      "| case | kernel | warps | stages | registers | spills | shared | loads | stores | matrix instructions |", "|---" * 10 + "|"]
        lines.append(f"| {case} {row}")
    for version in older:
        before, seen, rows, counts = _kernels(versions[version]), set(), [], dict.fromkeys(("spilled", "registers", "shared", "loads", "stores"), 0)
        for (case, kernel, number), ones in _kernels(versions[newest]).items():
            found = []
            for new in ones:
                old = next((one for one in before.get((case, kernel, number), ()) if one.target == new.target), None)
                what = "; ".join(_differences(new, old)) if old else "not compiled"
                if what and not case.startswith("layout of") and (kernel not in HELPERS or (kernel, new.target, what) not in seen):
                    seen.add((kernel, new.target, what))
                    found.append(f"{new.target}: {what}")
                    counts = {name: count + (name in what) for name, count in counts.items()}
            if found:
                rows.append(f"| {case} | {kernel} | {'. '.join(found)} |")
        lines += ["", f"## Triton {version}, where it differs", "",
                  f"In spills ({counts['spilled']} kernels), in registers by more than a tenth ({counts['registers']}), in shared memory ({counts['shared']}), or in the "
                  f"widths of its loads ({counts['loads']}) and stores ({counts['stores']}); not: what {newest} has.", "", "| case | kernel | |", "|---|---|---|", *rows]
    return lines
