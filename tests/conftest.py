"""Shared fixtures: a fixed seed per test, two threads, and clean backend counts."""

import os

# Several workers with two threads each share the cores: a thread that spins while it waits keeps the others from working. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # Triton reads it when it is imported: its kernels then run on CPU tensors, where the backend is forced
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fusewire.kernels import dispatch  # noqa: E402


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    dispatch.reset_stats()
    yield
