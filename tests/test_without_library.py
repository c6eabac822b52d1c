"""Without the compiled library, as where there is no compiler: swap, parity and doctor in a process that finds none."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import sys

import torch
from typer.testing import CliRunner

import fusewire
from fusewire import ops
from fusewire.cli import app
from fusewire.kernels.library import CPU
from tests.swap.tiny import generate, tiny_pipeline
from tests.tolerance import PIPELINE_FLOAT32

torch.manual_seed(0)
torch.set_num_threads(1)
assert not CPU.loaded and CPU.reason, CPU
pipe = tiny_pipeline()
want = generate(pipe)
with fusewire.swapped(pipe):
    assert torch.equal(generate(pipe), want)
called = {op: served for op, served in ops.stats().items() if any(served.values())}
assert len(called) > 5 and all(served["reference"] == sum(served.values()) for served in called.values()), called
with fusewire.swapped(pipe, "close"):
    assert (generate(pipe) - want).abs().max() <= PIPELINE_FLOAT32 * want.abs().max()
assert torch.equal(generate(pipe), want)
held = CliRunner().invoke(app, ["parity", "sd3-tiny", "--level", "op", "--level", "model"])
assert held.exit_code == 0 and "FAILS" not in held.output, held.output
told = CliRunner().invoke(app, ["doctor"])
assert told.exit_code == 0 and "make lib" in told.output, told.output
print(CPU.reason)
"""


def test_everything_works_on_the_reference(tmp_path):
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", CODE], env=os.environ | {"PYTHONPATH": path, "FUSEWIRE_LIB": str(tmp_path)}, cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "which FUSEWIRE_LIB names" in done.stdout
