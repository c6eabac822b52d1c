"""Shared fixtures: a fixed seed per test, two threads, and clean backend counts.

``FUSEWIRE_TEST_DEVICE=cuda``: the tests' tensors lie on the GPU. benchmarks/gpu.sh runs the rooms' tests of Triton and CUDA kernels so, which on other
machines run in Triton's interpreter and thread by thread on the CPU.
"""

import gc
import os

# Several workers with two threads each share the cores: a thread that spins while it waits keeps the others from working. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # Triton reads it when it is imported: its kernels then run on CPU tensors, where the backend is forced
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("FUSEWIRE_TEST_DEVICE"):
    torch.set_default_device(os.environ["FUSEWIRE_TEST_DEVICE"])

from fusewire.kernels import dispatch, plans  # noqa: E402
from tests.effort import EFFORT  # noqa: E402

# The same commit passes or fails the same way, wherever it is tested; `make test-all` draws examples anew each time.
hypothesis.settings.register_profile("fusewire", derandomize=EFFORT == 1)
hypothesis.settings.load_profile("fusewire")


def pytest_pycollect_makemodule():
    """What a file draws when it is imported does not depend on the files before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def what_stays():
    """What imports and caches of torch.compile left, millions of objects that stay, is not looked at by every later collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    dispatch.reset_stats()
    plans.forget()  # of tests that changed what launchers ask
    yield
    # What a test of 2^31 elements had stays with its process otherwise, and a GPU has many processes' tests
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()
