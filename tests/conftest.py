"""Shared fixtures: a fixed seed per test, two threads, and clean backend counts."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads it when it is imported: its kernels then run on CPU tensors, where the backend is forced
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fusewire.kernels import dispatch  # noqa: E402


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    dispatch.reset_stats()
    yield
