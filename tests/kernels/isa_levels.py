"""Tests of a file, run again in a process at a lower ISA level."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusewire.kernels.library import CPU, ISA_LEVELS, cpu_isa


def run_at(level: str, file: str, selection: str | dict[str, str], *more: str) -> None:
    """Run the tests of ``file``, and of the files ``more`` beside it, that ``selection`` (pytest's -k) names at ``level``; skips where that is not below
    this processor's own. {file beside it: its own selection}: those tests, in one process, most of whose time goes into imports."""
    if not CPU.loaded or ISA_LEVELS.index(level) >= ISA_LEVELS.index(cpu_isa()):
        pytest.skip(f"this processor runs at {cpu_isa() or 'no level'}")
    if isinstance(selection, dict):
        file, *more = [str(Path(file).parent / name) for name in selection]
        selection = " or ".join(f"({name} and ({those}))" for name, those in selection.items())
    code = (f"import pytest, sys; from fusewire.kernels.library import cpu_isa; assert cpu_isa() == {level!r}; "
            f"sys.exit(pytest.main([*{[str(Path(file)), *(str(Path(file).parent / name) for name in more)]!r}, '-x', '-q', '-p', 'no:cacheprovider', '-k', {selection!r}]))")
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"FUSEWIRE_CPU_ISA": level, "PYTHONPATH": path}, cwd=root,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
