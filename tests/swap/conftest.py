"""Tiny models: a second thread costs more than it brings. A test that is about threads takes the fixture ``two_threads``."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)
