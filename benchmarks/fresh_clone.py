"""How long the README's commands take on a fresh clone of the last commit, set-up and all; each step's time and whether it ended well.

``python benchmarks/fresh_clone.py [--json FILE] [--keep FOLDER] [STEP ...]``: the steps are ``set-up`` (the environment and the library, which either command
would make), ``demo``, ``test``, and ``ci``, all that is checked of a change. Every step gets the ones before it. Output goes to FOLDER/STEP.log.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from alternating import ROOT, machine, write

STEPS = {"set-up": ("make", ".venv/.installed"), "demo": ("make", "demo"), "test": ("make", "test"), "ci": (".ci/run",)}


def run(step: str, clone: Path, log: Path) -> dict:
    start = time.monotonic()
    with log.open("w") as out:
        code = subprocess.run(STEPS[step], cwd=clone, stdout=out, stderr=subprocess.STDOUT).returncode
    row = {"step": step, "command": " ".join(STEPS[step]), "seconds": round(time.monotonic() - start), "exit code": code}
    print(row, flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="in their order; set-up, demo and test unless given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="where the clone stays (a new folder)")
    arguments = parser.parse_args()
    if unknown := set(arguments.steps) - set(STEPS):
        parser.error(f"STEP is {', '.join(sorted(unknown))}; it should be one of {', '.join(STEPS)}")
    state = machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        clone = folder / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        rows = []
        for step in arguments.steps or ("set-up", "demo", "test"):
            rows.append(run(step, clone, folder / f"{step}.log"))
            if rows[-1]["exit code"]:
                break
        if arguments.json:
            write(arguments.json, rows, state, unit="seconds")
    return max(row["exit code"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
