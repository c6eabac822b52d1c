"""benchmarks/test_calls.py runs: in a process of its own, each call once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_each_call_once():
    done = subprocess.run([sys.executable, "-m", "pytest", "benchmarks/test_calls.py", "--benchmark-disable", "-p", "no:cacheprovider"], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "30 passed, 6 skipped" in done.stdout.replace("\n", " "), done.stdout[-500:]
