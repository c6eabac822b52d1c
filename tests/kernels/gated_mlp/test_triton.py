"""The Triton kernels of the gated activations in the interpreter: indexing, masks, layouts, sums over rows. (Races and speed: tests/gpu.)"""

import pytest
import torch

from fusewire import ops
from fusewire.kernels import dispatch
from fusewire.kernels.gated_mlp import triton_kernel
from tests.kernels.gated_mlp.cases import KINDS, call, inputs, leaves, stock, wide
from tests.kernels.interpreted import DTYPES, needs_interpreter
from tests.layouts import LAYOUTS
from tests.tolerance import assert_close, assert_exact

pytestmark = needs_interpreter


def gradients(kind, v, grad, backend="triton", function=None):
    these, wanted = leaves(v)
    with dispatch.forced(backend):
        out = call(kind, these, numerics="close") if function is None else function(these)
        return (out, *torch.autograd.grad(out, wanted, grad.to(out.dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width, bias", [(29, True), (63, False), (128, True), (1025, True)])
def test_values(kind, dtype, width, bias):
    """tail: less than a block, a tail, whole vectors, more than a block. Forward and backward."""
    v, grad = inputs(5, width, dtype, kind, bias), torch.randn(2, 5, width).to(dtype)
    got = gradients(kind, v, grad)
    plain = gradients(kind, v, grad, None, lambda v: stock(kind, v))
    want = gradients(kind, wide(v), grad, None, lambda v: stock(kind, v))
    for name, mine, theirs, exactly in zip(("result", *(name for name, t in v.items() if t is not None)), got, plain, want, strict=True):
        assert_close(mine, exactly, theirs, f"{kind} {name}")
    assert ops.stats()[KINDS[kind][0] + "_backward"]["triton"] == 1


@pytest.mark.parametrize("chunks", (1, 3, 5))
@pytest.mark.parametrize("kind", ("swiglu", "quick_gelu"))
def test_sums_over_many_rows(monkeypatch, kind, chunks):
    """Programs of the backward that walk over several rows, the last ones with fewer."""
    v, grad = inputs(7, 40, kind=kind), torch.randn(2, 7, 40)
    want = gradients(kind, v, grad)
    monkeypatch.setattr(triton_kernel, "CHUNKS", chunks)
    for got, expected in zip(gradients(kind, v, grad), want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_strided_input(kind, layout):
    v, grad = inputs(3, 20, torch.bfloat16, kind), torch.randn(2, 3, 20).to(torch.bfloat16)
    want = gradients(kind, v, grad)
    strided = {name: None if t is None else layout(t) for name, t in v.items()}
    for got, expected in zip(gradients(kind, strided, layout(grad)), want, strict=True):
        assert_exact(got, expected)


def test_batch_coupling():
    for kind in ("geglu", "quick_gelu"):
        v, grad = inputs(3, 40, kind=kind, bias=False, batch=8), torch.randn(8, 3, 40)
        for alone, together in zip(gradients(kind, {**v, "x": v["x"][5:6]}, grad[5:6]), gradients(kind, v, grad)):
            assert_exact(alone, together[5:6])


@pytest.mark.parametrize("sizes", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_empty(sizes):
    batch, rows, width = sizes
    for kind in KINDS:
        v = inputs(rows, width, kind=kind, batch=batch)
        found = gradients(kind, v, torch.ones(sizes))
        assert found[0].shape == sizes and found[1].shape == v["x"].shape and not any(grad.any() for grad in found[1:])


def test_exact_is_left_to_pytorch():
    with dispatch.forced("triton"), pytest.raises(RuntimeError, match="numerics='exact' keeps PyTorch's own activation"):
        ops.geglu(torch.ones(2, 8))
