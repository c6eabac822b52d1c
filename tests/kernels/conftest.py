"""The CUDA rows on the CPU: built once for a test run, for all its processes."""

import contextlib
import fcntl
import os

import pytest
import torch

from fusewire import ops
from fusewire.kernels import cuda_rows
from fusewire.kernels.dispatch import forced
from fusewire.kernels.library import CUDA
from tests.kernels.cuda_on_cpu import build


@pytest.fixture(scope="session")
def cuda_machine(tmp_path_factory):
    """csrc/cuda as a library for the CPU."""
    if build.COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cuda_on_cpu"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "libfusewire_cuda_on_cpu.so"
        if not library.is_file():
            build.build(folder, "unfinished.so", build.room_sources()).rename(library)
    return build.Machine(library)


@pytest.fixture
def in_cuda(cuda_machine, monkeypatch):
    """``with in_cuda(op, calls):`` forces the CUDA rows, on CPU tensors, and checks that they served ``calls`` calls of ``op``."""
    monkeypatch.setattr(cuda_rows, "DEVICE", "cpu")
    monkeypatch.setattr(CUDA, "loaded", True)
    monkeypatch.setattr(CUDA, "reason", "")

    @contextlib.contextmanager
    def run(op: str, calls: int = 1):
        before = ops.stats()[op]["cuda"]
        with forced("cuda"), torch.no_grad():
            yield
        assert ops.stats()[op]["cuda"] == before + calls

    return run
