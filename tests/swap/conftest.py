"""Tiny models: a second thread costs more than it brings. test_exact.py runs with both."""

import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(2 if request.module.__name__.endswith("test_exact") else 1)
    yield
    torch.set_num_threads(before)
