"""What the tests of the Triton rooms share: forced calls that must have run in Triton, and grids small enough for the interpreter."""

import contextlib

import pytest
import torch

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.triton_rows import INTERPRETED

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ON_GPU = torch.get_default_device().type == "cuda"  # FUSEWIRE_TEST_DEVICE
needs_interpreter = pytest.mark.skipif(not INTERPRETED and not ON_GPU, reason="Triton runs on the GPU here: set FUSEWIRE_TEST_DEVICE=cuda")


@contextlib.contextmanager
def in_triton(op: str, calls: int = 1):
    """Forces Triton and checks that it served ``calls`` calls of ``op``."""
    before = ops.stats()[op]["triton"]
    with forced("triton"), torch.no_grad():
        yield
    assert ops.stats()[op]["triton"] == before + calls


def on_reference(call):
    with forced("reference"), torch.no_grad():
        return call()


def unchanged(*tensors):
    """A check, to be called later, that no tensor was written to."""
    copies = [(tensor, tensor.clone()) for tensor in tensors if tensor is not None]

    def check():
        for tensor, copy in copies:
            assert torch.equal(torch.nan_to_num(tensor.float()), torch.nan_to_num(copy.float()))
    return check
