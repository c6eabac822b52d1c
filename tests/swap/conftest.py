"""Tiny models: a second thread costs more than it brings. A test that is about threads takes the fixture ``two_threads``."""

import pytest
import torch

from tests.one_thread import one_thread  # noqa: F401


@pytest.fixture
def two_threads(one_thread):
    torch.set_num_threads(2)
