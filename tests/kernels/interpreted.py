"""What the tests of the Triton rooms share: forced calls that must have run in Triton, and grids small enough for the interpreter."""

import contextlib

import pytest
import torch
from torch.library import opcheck

from fusewire import ops
from fusewire.kernels.dispatch import forced
from fusewire.kernels.triton_rows import INTERPRETED
from tests.tolerance import assert_within

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ON_GPU = torch.get_default_device().type == "cuda"  # FUSEWIRE_TEST_DEVICE
if INTERPRETED:
    from tests.kernels import quick_interpreter

    quick_interpreter.install()
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


def check_registered(name: str, reference, arguments: tuple) -> None:
    """opcheck of a Triton row's own op, which means what ``reference`` does, in the same strides."""
    op = getattr(torch.ops.fusewire, f"{name}_triton").default
    with forced("triton"):
        opcheck(op, arguments)
    results = op(*arguments), reference(*arguments)
    for got, want in zip(*((r if isinstance(r, tuple) else (r,)) for r in results), strict=True):
        assert got.shape == want.shape and got.stride() == want.stride()
        assert_within(got, want, 8)


def unchanged(*tensors):
    """A check, to be called later, that no tensor was written to."""
    copies = [(tensor, tensor.clone()) for tensor in tensors if tensor is not None]

    def check():
        for tensor, copy in copies:
            assert torch.equal(torch.nan_to_num(tensor.float()), torch.nan_to_num(copy.float()))
    return check
