"""Tests of a file, run again at a lower ISA level: in a process that was forked from one which has imported what they need, as that takes longer than most
of them."""

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fusewire.kernels.library import CPU, ISA_LEVELS, cpu_isa

ROOT = Path(__file__).parents[2]
SECONDS = 300
# Reads a line: [where its output goes, pytest's arguments]; writes one: the exit code of the process that it forked for them.
SERVER = """
import json, os, sys
import hypothesis, pytest, torch
from fusewire import ops
from fusewire.kernels.library import cpu_isa
assert cpu_isa() == sys.argv[1], cpu_isa()
for line in sys.stdin:
    output, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1), os.dup2(file, 2)
        code = pytest.main(arguments)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(int(code))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server(level: str) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", SERVER, level], env=os.environ | {"FUSEWIRE_CPU_ISA": level, "PYTHONPATH": path}, cwd=ROOT,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def run_at(level: str, file: str, selection: str | dict[str, str], *more: str) -> None:
    """Run the tests of ``file``, and of the files ``more`` beside it, that ``selection`` (pytest's -k) names at ``level``; skips where that is not below
    this processor's own. {file beside it: its own selection}: those tests."""
    if not CPU.loaded or ISA_LEVELS.index(level) >= ISA_LEVELS.index(cpu_isa()):
        pytest.skip(f"this processor runs at {cpu_isa() or 'no level'}")
    if isinstance(selection, dict):
        file, *more = [str(Path(file).parent / name) for name in selection]
        selection = " or ".join(f"({name} and ({those}))" for name, those in selection.items())
    files = [str(Path(file)), *(str(Path(file).parent / name) for name in more)]
    process = server(level)
    with tempfile.NamedTemporaryFile() as output:
        process.stdin.write(json.dumps([output.name, [*files, "-x", "-q", "-p", "no:cacheprovider", "-k", selection]]) + "\n")
        process.stdin.flush()
        ended = select.select([process.stdout], [], [], SECONDS)[0] and process.stdout.readline().strip()
        if not ended:  # it died, or took too long: the next call gets another
            process.kill()
            server.cache_clear()
        assert ended == "0", f"exit code {ended or 'none'}\n" + Path(output.name).read_text()[-3000:]
