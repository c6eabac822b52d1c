"""What importing may not do: load torch for the bare package, touch a GPU, or start threads that a forked child would miss."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusewire.kernels import triton_rows

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> str:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_bare_package_imports_no_torch():
    assert python("import fusewire, sys; print('torch' in sys.modules, 'diffusers' in sys.modules)") == "False False"


def test_ops_import_no_compiler_and_touch_no_gpu():
    code = "from fusewire import ops; import sys, torch; print('triton' in sys.modules, 'torch._dynamo' in sys.modules, torch.cuda.is_initialized())"
    assert python(code) == "False False False"


def test_the_mark_of_a_constant_result_is_the_installed_torch_s_own():
    """What triton_rows sets by hand, because the decorator that does it imports the compiler."""
    def decorated():
        pass

    assert vars(torch.compiler.assume_constant_result(decorated)) == vars(triton_rows.too_old)


def test_ops_work_in_a_process_that_sees_no_gpu():
    code = "import torch; from fusewire import ops; x = torch.ones(1, 4, 8); print(ops.gate_residual(x, x, x[:, 0]).sum().item())"
    assert python(code, CUDA_VISIBLE_DEVICES="") == "64.0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_fork():
    """Import, then fork: the child runs an op on several threads. Had importing started them, the child would wait for threads that it lacks."""
    code = """
import os, signal, torch
torch.set_num_threads(2)
from fusewire import ops
child = os.fork()
if not child:
    signal.alarm(60)
    x = torch.randn(2, 600, 512)
    out = ops.adaln_modulate(x, x[:, 0], x[:, 1], numerics="close")
    os._exit(0 if out.isfinite().all() else 3)
print(os.waitpid(child, 0)[1])
"""
    assert python(code) == "0"
