"""Mutation testing: does a room's test suite notice when its sources are wrong?

    python -m tests.mutation [--room R] [--mutant TEXT] [--limit N] [--seconds S] [--json FILE] [--native] [--tree FOLDER] [--again]
        [--write docs/mutation.md]

Each mutant of ``tests/mutants/`` is applied to a copy of the checkout's tracked files, whose tests then run with ``-x``. A mutant counts as killed
only where a test fails (or the interpreter dies, or the time runs out) and that very test passes without the mutant. Results are
written to FILE as they come, and what stands there already is not run again, so a run can be interrupted at any time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests import bug_classes
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[1]
SHARED = "shared"
ROOMS = (*bug_classes.ROOMS, SHARED)  # and what they share
TIMEOUT = 600  # seconds for a mutant's tests
LEFT_OUT = ("assets", "benchmarks/results", "tests/data")  # no room's test reads them
SELECTION, NO_CUDA = "not isa", " and not cuda"  # but tests that start processes of their own, and CUDA's, which build a library, where none is named


def tests_of(room: str) -> str:
    """Where the room's tests are."""
    return "tests/kernels" if room == SHARED else f"tests/kernels/{room}"


def mutants(room: str) -> tuple[Mutant, ...]:
    return importlib.import_module(f"tests.mutants.{room}").MUTANTS


def fingerprint(mutant: Mutant) -> list:
    """What a result is about: another edit, or other tests, is another mutant."""
    return [mutant.file, mutant.old, mutant.new, list(mutant.tests)]


def mutated(mutant: Mutant, root: Path = ROOT) -> str:
    """The text of the mutant's file with the edit; ValueError where its old text does not occur exactly once."""
    text = (root / mutant.file).read_text()
    if (count := text.count(mutant.old)) != 1 or mutant.new == mutant.old:
        raise ValueError(f"{mutant.file}: {mutant.old!r} occurs {count} times")
    return text.replace(mutant.old, mutant.new)


def copy_of_the_checkout(folder: Path) -> Path:
    """What is there already, as it should be, stays with its times, which a build goes by; what is gone from the checkout goes."""
    tracked = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    left_out = tuple(f"{left}/" for left in LEFT_OUT)
    names = {name for name in tracked.stdout.split("\0") if name and not name.startswith(left_out) and (ROOT / name).is_file()}
    for name in names:
        if not (folder / name).is_file() or (folder / name).read_bytes() != (ROOT / name).read_bytes():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for top in {name.partition("/")[0] for name in names if "/" in name}:
        for path in (folder / top).rglob("*"):
            if path.is_file() and path.relative_to(folder).as_posix() not in names:
                path.unlink()
    return folder


class Tree:
    """The copy, and how tests run in it."""

    def __init__(self, folder: Path, native: bool):
        self.root, self.native, self.mutated = copy_of_the_checkout(folder), native, False
        library = folder / "lib" if native else Path(os.environ.get("FUSEWIRE_LIB", ROOT / "src" / "fusewire" / "lib")).resolve()
        path = os.pathsep.join([str(self.root / "src"), str(self.root)])
        self.environment = os.environ | {"PYTHONPATH": path, "FUSEWIRE_LIB": str(library), "PYTHONDONTWRITEBYTECODE": "1",
                                         "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

    def build(self) -> bool:
        """The CPU library of the copy at this processor's vector level, in ``lib``."""
        level = "avx512" if "avx512bw" in Path("/proc/cpuinfo").read_text() else "avx2"
        configure = ["cmake", "-S", self.root, "-B", self.root / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                     f"-DPython_EXECUTABLE={sys.executable}", f"-DFUSEWIRE_ONLY_ISA={level}", f"-DFUSEWIRE_LIB_DIR={self.root / 'lib'}", "-DFUSEWIRE_CUDA=OFF"]
        return all(subprocess.run(command, capture_output=True).returncode == 0 for command in (configure, ["cmake", "--build", self.root / "build"]))

    def as_it_should_be(self) -> None:
        """The library without the last mutant of csrc, which is built only where something runs with it."""
        if self.mutated:
            self.mutated = not self.build()

    def run(self, tests: list[str]) -> tuple[str, str]:
        """("passed", ""), or ("failed", the first test that did), "crashed", "timeout" or "error"."""
        selection = SELECTION if any("cuda" in test for test in tests) else SELECTION + NO_CUDA
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-rf", "-p", "no:cacheprovider", "-W", "ignore", "-k", selection, *tests]
        try:
            done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            return "timeout", ""
        if done.returncode < 0:
            return "crashed", f"signal {-done.returncode}"
        if found := re.search(r"^(?:FAILED|ERROR) (\S+::\S.*?)(?: - .*)?$", done.stdout, re.MULTILINE):
            return "failed", found[1]
        return ("passed", "") if done.returncode == 0 else ("error", (done.stdout + done.stderr)[-500:])

    def outcome(self, room: str, mutant: Mutant) -> dict:
        start, path = time.perf_counter(), self.root / mutant.file
        plain = path.read_text()
        if not mutant.native:
            self.as_it_should_be()
        try:
            path.write_text(mutated(mutant, self.root))
            self.mutated |= mutant.native
            if mutant.native and not self.build():
                state, by = "error", "it does not compile"
            else:
                for test in mutant.tests:
                    state, by = self.run([f"{tests_of(room)}/{test}"])
                    if state != "passed":
                        break
        except ValueError as error:
            state, by = "not applicable", str(error)
        finally:
            path.write_text(plain)
        result = {"passed": "survived", "failed": "killed", "crashed": "killed", "timeout": "killed"}.get(state, state)
        return {"room": room, "what": mutant.what, "result": result, "by": by or state, "seconds": round(time.perf_counter() - start, 1),
                "mutant": fingerprint(mutant)}


def prove(tree: Tree, results: list[dict]) -> None:
    """A killing test that fails without a mutant too proves nothing: those results become "unproven"."""
    tree.as_it_should_be()
    open_ = [r for r in results if r["result"] == "killed" and "::" in r["by"] and not r.get("proven")]
    while open_:
        state, by = tree.run(sorted({r["by"] for r in open_}))
        if state == "passed":
            for r in open_:
                r["proven"] = True
            return
        guilty = [r for r in open_ if r["by"] == by] or open_
        for r in guilty:
            r["result"] = "unproven"
        open_ = [r for r in open_ if r not in guilty]


def finished(path: Path | None) -> list[dict]:
    return json.loads(path.read_text())["results"] if path and path.is_file() else []


def save(path: Path | None, results: list[dict]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps({"command": "python -m tests.mutation", "results": results}, indent=1) + "\n")
        temporary.replace(path)


def page(results: list[dict]) -> str:
    """docs/mutation.md"""
    texts = {(room, mutant.what): mutant for room in ROOMS for mutant in mutants(room)}
    counted = [r for r in results if (r["room"], r["what"]) in texts and fingerprint(texts[r["room"], r["what"]]) == r["mutant"]]
    lines = ["# Mutation testing", "", "Each mutant is one textual edit of a room's sources (`tests/mutants/`): the room's tests should fail. Generated by `make mutation`.",
             "A mutant counts as killed only where the test that failed passes without it.",
             "What has no result here is not counted. Those of csrc, of the library at one ISA level, run where `ARGUMENTS=--native` is given.", "",
             "| room | mutants | killed | equivalent | survived | killed, of those that are not equivalent | without a result |", "|---|---|---|---|---|---|---|"]

    def row(name: str, found: list[dict], rooms: tuple[str, ...]) -> str:
        there = sum(len(mutants(room)) for room in rooms)
        killed = sum(r["result"] == "killed" for r in found)
        equivalent = sum(r["result"] != "killed" and bool(texts[r["room"], r["what"]].equivalent) for r in found)
        share = f"{killed / max(len(found) - equivalent, 1):.0%}"
        return f"| {name} | {len(found)} | {killed} | {equivalent} | {len(found) - killed - equivalent} | {share} | {there - len(found)} |"

    lines += [row(room, [r for r in counted if r["room"] == room], (room,)) for room in ROOMS] + [row("all", counted, ROOMS), "", "## What was not killed", ""]
    left = [r for r in counted if r["result"] != "killed"]
    for r in left:
        mutant = texts[r["room"], r["what"]]
        reason = f"equivalent: {mutant.equivalent}" if mutant.equivalent else r["result"]
        lines += [f"- **{r['room']}**, {r['what']} (`{mutant.file}`): {reason}."]
    lines += [] if left else ["Nothing."]
    fastest = Counter(r["by"].partition("::")[0] for r in counted if "::" in r["by"])
    lines += ["", "## Which files killed", "", "| test file | mutants |", "|---|---|", *(f"| `{name}` | {count} |" for name, count in sorted(fastest.items())), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--room", action="append", choices=ROOMS, help="a room, again for others; all unless given")
    parser.add_argument("--mutant", action="append", help="only those whose description contains the text, again for others")
    parser.add_argument("--limit", type=int, help="at most so many mutants")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no mutant later than this")
    parser.add_argument("--json", type=Path, help="where results are kept, and found again by the next run")
    parser.add_argument("--native", action="store_true", help="also those of csrc, each of which takes a build")
    parser.add_argument("--tree", type=Path, help="where the copy and its build are kept, so that the next run compiles only what differs")
    parser.add_argument("--again", action="store_true", help="run those that were not killed again")
    parser.add_argument("--write", type=Path, help="the page to write from the results")
    arguments = parser.parse_args()
    rooms = arguments.room or ROOMS
    named = [(room, mutant) for room in rooms for mutant in mutants(room) if not arguments.mutant or any(text in mutant.what for text in arguments.mutant)]
    again = [fingerprint(mutant) for _, mutant in named if arguments.again]
    results = [r for r in finished(arguments.json) if r["result"] == "killed" or r["mutant"] not in again]
    known = [r["mutant"] for r in results]
    wanted = [(room, mutant) for room, mutant in named if fingerprint(mutant) not in known and (arguments.native or not mutant.native)][:arguments.limit]
    there = {(room, mutant.what): fingerprint(mutant) for room in ROOMS for mutant in mutants(room)}
    results = [r for r in results if there.get((r["room"], r["what"])) == r["mutant"]]
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with tempfile.TemporaryDirectory(prefix="mutation-") as folder, bar:
            tree = Tree((arguments.tree or Path(folder)).resolve(), arguments.native)
            if arguments.native and not tree.build():
                print("the library does not build: cmake, ninja and a C++ compiler are needed", file=sys.stderr)
                return 3
            task = bar.add_task("", total=len(wanted))
            end = time.monotonic() + arguments.seconds
            for i, (room, mutant) in enumerate(wanted):
                bar.update(task, description=f"{room}: {mutant.what}")
                results.append(tree.outcome(room, mutant))
                save(arguments.json, results)
                bar.console.print(f"{results[-1]['result']}, {results[-1]['seconds']} s: {room}, {mutant.what}: {results[-1]['by']}", soft_wrap=True, highlight=False, markup=False)
                bar.advance(task)
                over = time.monotonic() >= end
                if over or i + 1 == len(wanted) or wanted[i + 1][0] != room:
                    prove(tree, results)
                    save(arguments.json, results)
                if over:
                    break
    except KeyboardInterrupt:
        print(f"interrupted; {len(results)} results are kept", file=sys.stderr)
    counts = Counter(r["result"] for r in results)
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    if arguments.write:
        arguments.write.write_text(page(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
