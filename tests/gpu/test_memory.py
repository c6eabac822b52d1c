"""Peak memory of a call on a GPU. ``python -m pytest -m gpu tests/gpu``."""

import pytest
import torch

from fusewire.profile.memory import peak_of_call

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MIB = 2**20


def test_one_call_takes_64_mib_more():
    device = torch.device("cuda")

    def block(mib):
        return torch.empty(mib * MIB, dtype=torch.uint8, device=device)

    def more():
        wide = block(64)
        return block(8).clone(), wide.numel()

    assert peak_of_call(lambda: block(8).clone(), device) == (16 * MIB, 0)
    assert peak_of_call(more, device) == (80 * MIB, 0)
