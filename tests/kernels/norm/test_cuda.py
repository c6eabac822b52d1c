"""LayerNorm's CUDA row, which is PyTorch's own kernel: what it serves, and that its gradients and bits are PyTorch's. (On the CPU: the device check is patched.)"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fusewire import ops
from fusewire.kernels import cuda_rows, triton_rows
from fusewire.kernels.dispatch import BackendError, forced
from tests.kernels.interpreted import ON_GPU
from tests.kernels.norm.cases import inputs
from tests.tolerance import assert_exact

pytestmark = pytest.mark.skipif(ON_GPU, reason="tests/gpu has the kernel itself")


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(cuda_rows, "DEVICE", "cpu")
    with forced("cuda"):
        yield


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_values(on_cpu, dtype):
    """rows: PyTorch's own bits and gradients, whatever is left out."""
    for affine in ("plain", "weight", "weight-bias"):
        v = inputs(5, 40, dtype, "layer", affine)
        leaves = [t if t is None else t.clone().requires_grad_() for t in v.values()]
        again = [t if t is None else t.clone().requires_grad_() for t in v.values()]
        out, want = ops.layer_norm(*leaves, eps=1e-3, numerics="close"), F.layer_norm(again[0], (40,), *again[1:], 1e-3)
        assert_exact(out, want)
        grad = torch.randn_like(out)
        out.backward(grad), want.backward(grad)
        for got, expected in zip(leaves, again):
            assert got is expected is None or torch.equal(got.grad, expected.grad)
    assert ops.stats()["layer_norm"]["cuda"] == 3


def test_what_it_leaves_to_others(on_cpu):
    x, weight, bias = inputs(5, 40).values()
    for wanted, args, numerics in (("exact", (x, weight, bias), "exact"), ("float64", (x.double(), None, None), "close"), ("another dtype", (x, weight.double(), None), "close"),
                                   ("another dtype", (x.bfloat16(), None, bias), "close"), ("not contiguous", (x.transpose(0, 1), weight, bias), "close")):
        with pytest.raises(BackendError, match=wanted):
            ops.layer_norm(*args, numerics=numerics)
    with torch.autocast("cpu"), pytest.raises(BackendError, match="autocast is on"):
        ops.layer_norm(x, weight, bias, numerics="close")
    with forced(None), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_rows, "LARGE", 200)
        patch.setattr(cuda_rows, "MISSING", ""), patch.setattr(cuda_rows, "INTERPRETED", False), patch.setattr(triton_rows, "MISSING", "")
        for batch, large in ((1, False), (3, False), (2, True)):  # by the sample, not by the batch
            reason = next(choice.reason for choice in ops.backends("layer_norm", torch.randn(batch, 5 if large else 4, 40), numerics="close") if choice.backend == "cuda")
            assert ("Triton's kernel is faster" in reason) is large, reason


def test_elsewhere():
    """Without the patch, on the CPU."""
    choice = next(choice for choice in ops.backends("layer_norm", inputs(5, 40)["x"], numerics="close") if choice.backend == "cuda")
    assert not choice.runs and choice.reason == "x is on cpu"
