"""Shared fixtures: a fixed seed per test, two threads, and clean backend counts."""

import pytest
import torch

from fusewire.kernels import dispatch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
    dispatch.reset_stats()
    yield
