"""What the rooms' tests share: none passes on the reference unmeant; the CUDA rows on the CPU, built once for a test run, for all its processes."""

import contextlib
import fcntl
import os
from pathlib import Path

import pytest
import torch

from fusewire import ops
from fusewire.kernels import cuda_rows
from fusewire.kernels.dispatch import forced, forced_backend
from fusewire.kernels.library import CPU, CUDA
from fusewire.kernels.norm import native as norm_native
from tests.kernels.cuda_on_cpu import build

ON_GPU = torch.get_default_device().type == "cuda"  # FUSEWIRE_TEST_DEVICE


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test of a room that means to test a kernel must not pass where the reference served all that it called."""
    result = yield
    if not meant_for_reference(pyfuncitem) and (calls := only_reference_served()):
        pytest.fail(f"the reference served every call ({calls}), so that no kernel was tested; `ops.backends` says why. Where that is meant, mark the "
                    "test: @pytest.mark.on_reference(reason=..., when=...)", pytrace=False)
    return result


def meant_for_reference(item) -> bool:
    """By the mark ``on_reference``, for all parameters or those that its ``when`` takes; by a parameter or a forced backend "reference"; for want of a
    compiled library; or outside the rooms, where dispatch itself is tested."""
    if not CPU.loaded or forced_backend() == "reference" or item.path.parent.parent != Path(__file__).parent:
        return True
    values = item.callspec.params if hasattr(item, "callspec") else {}
    conditions = [mark.kwargs.get("when", lambda **_: True) for mark in item.iter_markers("on_reference")]
    return any(isinstance(value, str) and value == "reference" for value in values.values()) or any(holds(**values) for holds in conditions)


def only_reference_served() -> str:
    """"op: calls, ..." where fused ops were called since the test began and the reference served them all; ``""`` otherwise. (Calls that a test makes of
    registered ops directly, in compiled graphs and in other processes are not counted.)"""
    called = {op: counts for op, counts in ops.stats().items() if any(counts.values())}
    if any(sum(counts.values()) > counts["reference"] for counts in called.values()):
        return ""
    return ", ".join(f"{op}: {counts['reference']}" for op, counts in called.items())


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
def in_cuda(request, monkeypatch):
    """``with in_cuda(op, calls):`` forces the CUDA rows, and checks that they served ``calls`` calls of ``op``: on CPU tensors, or where the tests'
    tensors lie on a GPU, there."""
    if ON_GPU:
        if not CUDA.loaded:
            pytest.skip(CUDA.reason)
    else:
        request.getfixturevalue("cuda_machine")
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


@pytest.fixture(autouse=True)
def left_to_pytorch(monkeypatch):
    """The library's own exact layer norm is tested in float32 too, which by default is PyTorch's there; the dtypes that are."""
    before = norm_native.LEFT_TO_PYTORCH
    monkeypatch.setattr(norm_native, "LEFT_TO_PYTORCH", set())
    return before
