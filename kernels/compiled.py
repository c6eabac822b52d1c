"""Compiles the Triton kernels where there is no GPU, and reports what can be seen in the code: registers, spills, shared memory, load widths.

``python -m fusewire.kernels.compiled`` runs the rooms' own launchers on meta tensors: what is compiled is what they would launch, with Triton's
own specialisation. The cases are in aot/, what must not be in aot/limits.py. ``--write FILE`` makes docs/kernels-compiled.md.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

from fusewire.kernels.aot import report as reading
from fusewire.kernels.aot.limits import faults, unused_waivers
from fusewire.kernels.aot.page import page
from fusewire.kernels.aot.report import TARGETS, Compiled, Offline, report, written_in_gluon


def launches_of(name: str, target: str) -> list[tuple]:
    """(kernel, arguments, options) of what the launcher of the case would launch on the target."""
    from fusewire.kernels.aot.cases import CASES
    from fusewire.kernels.triton_launch import launches_go_to

    found: list[tuple] = []
    with launches_go_to(TARGETS[target], lambda kernel, programs, args, options: found.append((kernel, args, options))):
        CASES[name]()
    return found


def _aligned(kernel, args, options: dict) -> bool:
    """Whether every row starts on 16 bytes, as Triton sees it: by pointers and by strides, which attention counts in units of 16 bytes."""
    given = dict(zip(kernel.arg_names, args))
    if not (options.get("ALIGNED", True) and options.get("MERGED", True)) or any(hasattr(value, "data_ptr") and value.data_ptr() % 16 for value in given.values()):
        return False
    if "PLANES" in options:  # pictures: pixels, or a group's channels, lie side by side
        return given["pixels" if options["PLANES"] else "per_group"] % 16 == 0
    specialised = [value for parameter, value in zip(kernel.params, args) if isinstance(value, int) and not (parameter.is_constexpr or parameter.do_not_specialize)]
    return options.get("UNIT", 1) > 1 or all(value in (0, 1) or value % 16 == 0 for value in specialised)


def _described(value, constant: bool, specialised: bool) -> str:
    """An argument, as far as the code that Triton makes depends on it."""
    if constant or value is None or isinstance(value, bool):
        return repr(value)
    if hasattr(value, "block_shape"):  # a TMA descriptor
        return f"{value.base.dtype} {value.block_shape} {value.layout}"
    if hasattr(value, "data_ptr"):  # AMD's instructions differ from 2 GiB on
        return f"{value.dtype} {value.data_ptr() % 16 == 0} {value.untyped_storage().size() < 2**31}"
    if isinstance(value, float):
        return "float"
    return f"int{32 if -2**31 <= value < 2**31 else 64}" + (f" {value == 1} {value % 16 == 0}" if specialised else "")


@functools.cache
def _source(kernel) -> str:
    """Of the kernel and of what it calls, with the constants that these name. (Triton's own hash of a kernel depends on which was asked for first.)"""
    found, waiting = {}, [kernel]
    while waiting:
        function = waiting.pop().fn
        found[function.__qualname__, function.__module__] = inspect.getsource(function)
        for name in function.__code__.co_names:  # of attributes, too
            value = function.__globals__.get(name)
            if type(value).__name__ == "constexpr":
                found[name, function.__module__] = str(value)
            elif hasattr(value, "fn") and (value.fn.__qualname__, value.fn.__module__) not in found:
                waiting.append(value)
    return str(sorted(found.items()))


def digest(target: str, kernel, args, options: dict) -> str:
    """Of all that the report of a launch depends on: Triton's version, the kernel's source and what it calls, what it is specialised by, how it is
    read."""
    import triton

    given = [_described(value, parameter.is_constexpr, not parameter.do_not_specialize) for parameter, value in zip(kernel.params, args)]
    parts = [triton.__version__, target, _source(kernel), *given, *(f"{name}={value}" for name, value in options.items())]
    return hashlib.sha256("\n".join(parts).encode() + Path(reading.__file__).read_bytes()).hexdigest()


def compile_case(name: str, target: str, wanted: list[int] | None = None) -> list[Compiled]:
    """Every kernel that the launcher of the case would launch on the target, or those of the ``wanted`` numbers."""
    from triton.runtime import driver

    driver.set_active(Offline(TARGETS[target]))
    return [replace(report(name, target, kernel, options, kernel.run(*args, grid=(1,), warmup=True, **options)), aligned=_aligned(kernel, args, options))
            for i, (kernel, args, options) in enumerate(launches_of(name, target)) if wanted is None or i in wanted]


def compile_all(names, targets, processes: int = 2, keep: Path | None = None) -> list[Compiled]:
    """The cases on the targets that they are for, compiled in ``processes`` processes. ``keep``: a folder for the reports, each of which is there as soon as
    it is made: one that is there is not made again, nor is the same launch of two cases."""
    import triton

    pairs = [(name, target) for name in names for target in targets if target == "sm_90" or not written_in_gluon(name)]
    if keep is None:
        with ProcessPoolExecutor(processes) as pool:
            return [one for found in pool.map(compile_case, *zip(*pairs)) for one in found]
    keep.mkdir(parents=True, exist_ok=True)
    file = keep / f"{triton.__version__}.jsonl"
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.is_file() else []  # the last may be half written
    file.write_text("".join(lines))
    kept = {key: Compiled(**fields) for key, fields in map(json.loads, lines)}
    launches = {pair: launches_of(*pair) for pair in pairs}
    digests = {pair: [digest(pair[1], *launch) for launch in found] for pair, found in launches.items()}
    wanted: dict[str, tuple[tuple[str, str], int]] = {}
    for pair, keys in digests.items():
        for i, key in enumerate(keys):
            if key not in kept:
                wanted.setdefault(key, (pair, i))
    with ProcessPoolExecutor(processes) as pool, file.open("a") as out:
        running = {pool.submit(compile_case, *pair, [i]): key for key, (pair, i) in wanted.items()}
        for done in as_completed(running):
            key, (kept[key],) = running[done], done.result()
            print(json.dumps([key, asdict(kept[key])]), file=out, flush=True)
    return [replace(kept[key], case=pair[0], aligned=_aligned(*launch)) for pair in pairs for key, launch in zip(digests[pair], launches[pair])]


def by_another(triton: Path, arguments: list[str]) -> list[Compiled]:
    """What this command reports with the Triton in the folder ``triton``, in a process of its own."""
    path = os.pathsep.join(filter(None, (str(triton.resolve()), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-m", "fusewire.kernels.compiled", "--json", *arguments], env=os.environ | {"PYTHONPATH": path},
                          stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(f"the Triton in {triton} reported nothing")
    return [Compiled(**one) for one in json.loads(done.stdout)]


def main() -> int:
    from fusewire.kernels.aot.cases import CASES, QUICK

    parser = argparse.ArgumentParser(prog="python -m fusewire.kernels.compiled", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the few cases that the default test run checks")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this case (may be repeated)")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this target (may be repeated)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the reports there, and take from there what was made before: can be interrupted")
    parser.add_argument("--oldest", type=Path, metavar="FOLDER", help="compile with the Triton in this folder, too")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page, in the place of an older one's part above the CUDA kernels")
    options = parser.parse_args()
    reports = compile_all(options.case or (QUICK if options.quick else CASES), options.target or TARGETS, keep=options.keep)
    if options.oldest:
        given = [f"--case={name}" for name in options.case or ()] + [f"--target={name}" for name in options.target or ()]
        given += ["--quick"] * options.quick + [f"--keep={options.keep}"] * bool(options.keep)
        reports += by_another(options.oldest, given)
    if options.json:
        print(json.dumps([asdict(one) for one in reports]))
    else:
        lines = page(reports)
        if options.write:
            _, found, behind = options.write.read_text().partition("\n## The CUDA kernels") if options.write.is_file() else ("", "", "")
            options.write.write_text("\n".join(lines) + "\n" + found + behind)
        else:
            print("\n".join(lines))
    bad = [f"{one.case} on {one.target}, Triton {one.triton}: {fault}" for one in reports for fault in faults(one)]
    if options.oldest and not (options.case or options.quick or options.target):
        bad += unused_waivers(reports)
    print("\n".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
